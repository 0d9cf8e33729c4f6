"""What a student is trained towards, and on which tokens: the types that trainer, losses, cache and teachers share.

Shapes: B rows, T positions, H hidden size, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a step, padded on the right.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool, False on padding.
        labels: [B, T] int64, the token that position t predicts (that of t + 1); any number where it does not count.
        counted: [B, T] bool, whether position t counts in the loss.
        samples: the key of each row, under which a cache keeps its teacher's distributions.
        positions: [B, T] int64, from 0 in each document of a row: tokens see their own document only. None: a row is one document.
        starts: `attention.starts_of` the positions, found where these still are on the host; None: it is found when it is asked for.
        longest: no document of `starts` has more tokens; None: than a row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    counted: Tensor
    samples: Sequence[str]
    positions: Tensor | None = None
    starts: Tensor | None = None
    longest: int | None = None


@dataclass(frozen=True)
class Hidden:
    """A teacher's whole distribution as hidden states before its head: logits = states @ weight.T + bias.

    Args:
        states: [B, T, H].
        weight: [V, H]; bias: [V], or None.
        softcap: logits become softcap * tanh(logits / softcap); scale: logits are multiplied by it first.
        tokens: how many rows of the head, the first ones, are of tokens that the tokenizer knows; None: that is not known.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    tokens: int | None = None

    def of_first(self, tokens: int) -> Hidden:
        """The distribution over the first tokens alone; nothing is copied."""
        if tokens >= len(self.weight):
            return self
        return replace(self, weight=self.weight[:tokens], bias=None if self.bias is None else self.bias[:tokens])


@dataclass(frozen=True)
class TopK:
    """The most likely tokens of a teacher's distribution, the rest as one number.

    Args:
        ids: [B, T, K] int64, by falling probability.
        logp: [B, T, K] log-probabilities, normalized over the whole vocabulary.
        label_logp: [B, T] log-probability of the label.
        tokens: of how many tokens, the first ones, that vocabulary is; None: of as many as the student's.
    """

    ids: Tensor
    logp: Tensor
    label_logp: Tensor
    tokens: int | None = None


class Teacher(Protocol):
    """Who says what to train towards; without gradient."""

    def __call__(self, batch: Batch) -> Hidden | TopK:
        """Distributions of all positions of a batch."""
