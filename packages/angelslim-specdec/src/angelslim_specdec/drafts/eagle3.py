"""EAGLE-3: one layer that reads three layers of the target beside the next token's embedding, with a head of its own.

Source: arXiv:2503.01840; the norms of EAGLE-3.1 by options.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from .base import Batch, Draft, Heads, Loss, TargetShape
from .exit_signals import Signal, labels, losses, read
from .layers import RMSNorm, vocabulary_ids
from .stepwise import Stepwise, StepwiseConfig, layer_parts

DEFAULT_VOCABULARY = 32000


class Eagle3Config(StepwiseConfig):
    """Where EAGLE-3 normalises, and what it says of thoughts."""

    norm_before_residual: bool = Field(False, description="attention adds to the normalised features")
    norm_before_fc: bool = Field(False, description="one norm over all tapped layers, before they are mixed")
    fc_norm: bool = Field(False, description="a norm for each tapped layer, before they are mixed")
    norm_output: bool = Field(False, description="the next step reads the output after the last norm")
    exit_signals: tuple[Signal, ...] = Field(
        (), description="what it also says of a thought, for SpecExit, which is not lossless: some of confidence, progress, remain"
    )
    thought_end_id: int = Field(-1, ge=-1, description="token that closes a thought, for training these; -1: the target has none")
    answer_end_ids: tuple[int, ...] = Field((), description="tokens that end an answer, for training these")

    @field_validator("exit_signals", mode="before")
    @classmethod
    def _signals(cls, given: Any) -> Any:
        """Names may come in one, as in confidence_progress_remain."""
        found = given.split("_") if isinstance(given, str) else given
        if not isinstance(found, list | tuple):
            return given
        if len(found) > len(set(map(str, found))):
            raise ValueError("one signal is named twice")
        return tuple(found)


class Eagle3(Stepwise):
    """fc of the tapped layers, one decoder layer on [embedding, features], norm, head."""

    name: ClassVar[str] = "eagle3"
    architecture: ClassVar[str] = "Eagle3LlamaForCausalLM"
    Config = Eagle3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        taps, width = len(config.aux_hidden_state_layer_ids), config.target_hidden_size
        self.fc = nn.Linear(taps * width, hidden + len(config.exit_signals), bias=False)
        nn.init.zeros_(self.fc.weight[hidden:].detach())  # an exponential of what is drawn could be anything
        self.input_norm = RMSNorm(taps * width, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in range(taps)) if config.fc_norm else None
        embedding = {"input_layernorm": RMSNorm(width, eps), "hidden_norm": RMSNorm(hidden, eps)}
        self.midlayer = nn.ModuleDict({**embedding, **layer_parts(config, width + hidden)})
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)

    @classmethod
    def from_target(cls, target: TargetShape, *, draft_vocab_size: int | None = None, **options: Any) -> Draft:
        if options.get("exit_signals"):
            options = {"thought_end_id": target.thought_end_id, "answer_end_ids": tuple(target.special_ids), **options}
        return super().from_target(target, draft_vocab_size=draft_vocab_size, **options)

    @property
    def layer(self) -> nn.ModuleDict:
        return self.midlayer

    @property
    def norms(self) -> tuple[RMSNorm, RMSNorm]:
        of_embedding, of_carried = self.midlayer["input_layernorm"], self.midlayer["hidden_norm"]
        assert isinstance(of_embedding, RMSNorm) and isinstance(of_carried, RMSNorm)
        return of_embedding, of_carried

    @property
    def feeds_normed(self) -> bool:
        return bool(self.config.norm_output)

    @classmethod
    def default_vocabulary(cls, target: TargetShape) -> int:
        return min(DEFAULT_VOCABULARY, target.vocab_size)

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        return tuple(sorted(min(max(i, 0), layers - 1) for i in (1, layers // 2 - 1, layers - 4)))

    @torch.no_grad()
    def begin(self, heads: Heads, norm: Tensor | None = None) -> None:
        """The head points where the target's does, which has its last norm within, but is as short as a fresh one: a sure guess costs most at first."""
        ids = vocabulary_ids(self)
        rows = (heads.head if ids is None else heads.head[ids]).float()
        if rows.shape[1] == self.lm_head.in_features:
            rows = rows if norm is None else rows * norm.float()
            self.lm_head.weight.copy_(rows * (3 * rows.shape[1]) ** -0.5 / rows.std())

    def train_loss(self, batch: Batch, heads: Heads) -> Loss:
        loss, config = super().train_loss(batch, heads), self.config
        if not config.exit_signals:
            return loss
        told = labels(batch, heads, config.thought_end_id, config.answer_end_ids, confidence="confidence" in config.exit_signals)
        rows = self._normed(batch.aux.flatten(0, 1)[told.rows])
        found = losses(functional.linear(rows, self.fc.weight[config.hidden_size :]), told, config.exit_signals)
        return replace(loss, sums=torch.cat((loss.sums, found[0])), counts=torch.cat((loss.counts, found[1])), weights=torch.cat((loss.weights, found[2])))

    def signals(self, aux: Tensor) -> Tensor:
        """[..., n], fp32: what `exit_signals` names, of the target's features [..., n H]."""
        return read(functional.linear(self._normed(aux), self.fc.weight[self.config.hidden_size :]), self.config.exit_signals)

    def features(self, aux: Tensor) -> Tensor:
        return functional.linear(self._normed(aux), self.fc.weight[: self.config.hidden_size])

    def _normed(self, aux: Tensor) -> Tensor:
        aux = aux.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            aux = self.input_norm(aux)
        if self.fc_norm is not None:
            aux = torch.cat([norm(part) for norm, part in zip(self.fc_norm, aux.chunk(len(self.fc_norm), -1), strict=True)], -1)
        return aux

    def mixed(self, pair: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        return pair[..., self.config.target_hidden_size :] if self.config.norm_before_residual else carried, pair

    def head_weight(self, heads: Heads) -> Tensor:
        return self.lm_head.weight
