"""Teachers that are models: of another folder, the model as it was before training, or the student itself without rounding."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from angelslim_core import fake_quant
from angelslim_core.errors import ModelError
from angelslim_core.fake_cache import placed_caches
from angelslim_core.model import decoder_layers

from .fingerprints import vocabulary_hash, vocabulary_size
from .heads import Reader
from .targets import Batch, Hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from angelslim_core.parallel import Group
    from angelslim_core.sharded import Spread


class ModelTeacher:
    """A model's whole distributions, without gradient and without dropout.

    Args:
        model: nothing of it rounds while it teaches, so that a student whose weights are frozen can be its own teacher.
        tokens: that the tokenizer knows, where a student's head may be padded otherwise; None: they are not known.

    Attributes:
        reader: what runs it.
    """

    def __init__(self, model: PreTrainedModel, tokens: int | None = None) -> None:
        self.model, self.reader, self._tokens = model, Reader(model), tokens
        self._parts: Spread | None = None

    @property
    def can_pack(self) -> bool:
        """Whether documents can share a row."""
        return self.reader.can_pack

    def divide(self, group: Group, device: torch.device) -> None:
        """Lay the model in parts over processes, on a device. From now on all of them call it equally often, and a call's head is there until `release`."""
        from angelslim_core.sharded import Spread

        if self._parts is None:
            layers = decoder_layers(self.model, self.model.config.get_text_config().num_hidden_layers)[1]
            self._parts = Spread(self.model, group, device, layers)

    def release(self) -> None:
        """Let go of the head of the last call, which nothing reads from now on; of a model that is whole nothing is let go."""
        if self._parts is not None:
            self._parts.release()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Hidden:
        """Distributions of all positions of a batch."""
        if self._parts is not None:
            self._parts.meet()
        was = self.model.training
        try:
            if was:  # to ask each module takes the host some time
                self.model.eval()
            with fake_quant.rounding_off(self.model):
                return replace(self.reader(batch), tokens=self._tokens)
        finally:
            if was:
                self.model.train()


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is now, without quantizers, never to be trained."""
    made = copy.deepcopy(model).requires_grad_(False).eval()
    for linear in fake_quant.placed(made).values():
        del linear.quantizer
        linear.__class__ = nn.Linear  # type: ignore[assignment]
    for name in placed_caches(made):
        del made.get_submodule(name).quantizer
    return made


def teacher_of(model: PreTrainedModel) -> ModelTeacher:
    """The model as it is now: itself where only quantizers are trained, else a copy.

    Args:
        model: whose parameters say whether they will be trained.
    """
    trains_weights = any(p.requires_grad for name, p in model.named_parameters() if ".quantizer." not in name)
    return ModelTeacher(frozen_copy(model) if trains_weights else model)


def teacher_from(folder: Path, tokenizer: PreTrainedTokenizerBase, device: str) -> ModelTeacher:
    """The model of a folder.

    Raises:
        ModelError: it has no tokenizer, or another one than the student.
    """
    from angelslim_core.loading import load_model

    check_tokenizer(folder, tokenizer)
    return ModelTeacher(load_model(folder, device, packed=False).model.requires_grad_(False), vocabulary_size(tokenizer))


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A teacher's distributions are over the student's tokens.

    Raises:
        ModelError: the folder has no tokenizer, or another one.
    """
    from angelslim_core.loading import load_tokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(912, str(folder), "has no tokenizer, so that its tokens cannot be compared to the student's", "copy the teacher's tokenizer there")
    if vocabulary_hash(load_tokenizer(folder)) != vocabulary_hash(tokenizer):
        raise ModelError(
            913, str(folder), "has another tokenizer than the student, and distributions are compared token by token",
            "give a teacher of the same vocabulary; `uld_loss` compares others, in a training of one's own",
        )  # fmt: skip
