"""Answers that a student samples itself.

Shapes: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from angelslim_core.fake_quant import FakeQuantizedLinear, placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RolloutSource(Protocol):
    """What answers prompts as the student does now; an engine that serves its weights may."""

    def __call__(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Tokens of an answer to each prompt, with the end of turn where it came to one and nothing after that."""


@dataclass(frozen=True)
class Sampled:
    """A `RolloutSource`: the student, by transformers' `generate`.

    Args:
        temperature: logits are divided by it.
        top_p: tokens are drawn of the most likely ones that together have this probability.
        stop_ids: tokens that end an answer.
        tokens: that the tokenizer knows: what pads the head is not drawn; None: all of the head are.
    """

    model: PreTrainedModel
    max_new_tokens: int
    stop_ids: Sequence[int]
    temperature: float = 1.0
    top_p: float = 1.0
    tokens: int | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """An answer to each prompt; the seed alone decides what is drawn, and no random state changes."""
        from transformers import GenerationConfig

        model, width = self.model, max(map(len, prompts))
        device = model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
        stops, width_of_head = list(self.stop_ids), model.get_output_embeddings().weight.shape[0]
        wanted = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=0, num_beams=1, use_cache=True,
            suppress_tokens=list(range(self.tokens or width_of_head, width_of_head)) or None, eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0,
            remove_invalid_values=True,  # of a training that diverges, which its loss says; to sample of NaN ends a GPU's context
        )  # fmt: skip
        with sampling(model, wanted), torch.random.fork_rng([device] if device.type == "cuda" else []):
            # the plain seed call would reach devices that are not forked
            (torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator).manual_seed(seed)
            written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))  # type: ignore[operator]
        return [_ended(answer, set(stops)) for answer in written[:, width:].tolist()]


@contextmanager
def sampling(model: PreTrainedModel, wanted: object) -> Iterator[None]:
    """Inside, a model is in evaluation, rounds each weight once instead of at each token, and takes nothing from its own generation config."""
    was, own, linears = model.training, model.generation_config, placed(model).values()
    try:
        model.eval()
        model.generation_config = wanted
        for linear in linears:
            _hold(linear)
        yield
    finally:
        for linear in linears:
            linear.quantizer.__dict__.pop("product", None)
        model.generation_config = own
        model.train(was)


def _hold(linear: FakeQuantizedLinear) -> None:
    """Let a linear multiply by its weight as it is rounded now, which is what any product is in evaluation."""
    quantizer = linear.quantizer
    rounded, bias = quantizer.weight(linear.weight), quantizer.biased(linear.weight, linear.bias)
    quantizer.__dict__["product"] = lambda x, *_: nn.functional.linear(quantizer.inputs(x), rounded, bias)


def _ended(answer: list[int], stops: set[int]) -> list[int]:
    """An answer up to its end of turn, which is kept."""
    end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
    return answer[: end + 1]


def is_empty(answer: Sequence[int], stop_ids: Sequence[int]) -> bool:
    """Whether an answer says nothing before it ends."""
    return not answer or (len(answer) == 1 and answer[0] in stop_ids)
