"""What a strategy reads, and what it says: tokens of a pool, and which of them stay or are merged.

Shapes: P pools, N tokens of the largest, K kept ones of the one that keeps most, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Source = Literal["encoder", "llm"]
# layers of an encoder that are an architecture's own: whose output the projector gets, and a middle one
OwnLayer = Literal["features", "objects"]
# of attention, as `statistics` computes them: "importance" is the row of the class token where the encoder has one, else what every token receives
Statistic = Literal["importance", "received", "keys", "last_row", "pooled_diagonal", "pooled_max", "hidden", "raw_keys"]


class Need(NamedTuple):
    """A statistic of one attention layer.

    Args:
        source: which stack of layers.
        layer: its number; negative ones count from the end; or the encoder's own, which `models` has by architecture.
    """

    source: Source
    layer: int | OwnLayer
    statistic: Statistic


class Grid(NamedTuple):
    """Frames, rows and columns of an image or video, in tokens as the language model gets them."""

    frames: int
    rows: int
    columns: int


def of_host(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """On the device without a wait for it, as `torch.tensor` waits that is told the device."""
    return torch.tensor(tuple(values), dtype=dtype).to(device, non_blocking=True)


def before(counts: Tensor, most: int) -> Tensor:
    """[B, most], bool: which numbers are below counts [B]."""
    return torch.arange(most, device=counts.device) < counts[:, None]


@dataclass(frozen=True)
class Pool:
    """Tokens among which a strategy chooses: all of a prompt, of an image, a frame or a clip; P pools side by side.

    Args:
        features: [P, N, D], in the language model's space, of its dtype; what stands behind a pool's tokens is not read.
        counts: tokens of each pool, known to the host, so that nothing waits for a device.
        segments: [P, N], int64: which image, frame or clip of its pool each token is of, from 0; None: a pool is one.
        grids: of each pool, those of its segments in order; empty: none are known.
        statistics: what the strategy asked for: [P, N], [P, N, d] for keys and hidden states.
        text: [P, M, D]: embeddings of the prompts' text; None: not asked for.
        text_counts: of each pool.
        text_statistics: [P, M, d], of the text's tokens: what the strategy's `text_needs` names.
        text_before: of each pool, how many of its text's tokens stand before the last of its tokens in the prompt.
    """

    features: Tensor
    counts: tuple[int, ...]
    segments: Tensor | None = None
    grids: tuple[tuple[Grid, ...], ...] = ()
    statistics: Mapping[Need, Tensor] = field(default_factory=dict)
    text: Tensor | None = None
    text_counts: tuple[int, ...] = ()
    text_statistics: Mapping[Need, Tensor] = field(default_factory=dict)
    text_before: tuple[int, ...] = ()

    @cached_property
    def valid(self) -> Tensor:
        """[P, N], bool: which are tokens at all."""
        return before(of_host(self.counts, self.features.device), self.features.shape[1])

    def one(self, number: int) -> Pool:
        """A pool of its own, without padding."""
        n = self.counts[number]

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[number : number + 1, :n]

        def cut_text(x: Tensor) -> Tensor:
            return x[number : number + 1, : self.text_counts[number]]

        return Pool(
            self.features[number : number + 1, :n], (n,), cut(self.segments), self.grids[number : number + 1],
            {need: x[number : number + 1, :n] for need, x in self.statistics.items()}, None if self.text is None else cut_text(self.text),
            self.text_counts[number : number + 1], {need: cut_text(x) for need, x in self.text_statistics.items()}, self.text_before[number : number + 1],
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Which tokens of each pool stay, and what of the others goes into them.

    Args:
        keep: [P, K], int64, ascending: the token that stands for each kept one and lends it its position; -1 behind the last of a pool.
        groups: [P, N], int64: which of the K each token is merged into, -1 none; None: nothing is merged.
        weights: [P, N], fp32: a token's share in its group, all of a group's being 1.
    """

    keep: Tensor
    groups: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, kept: Sequence[Tensor]) -> Plan:
        """Pruning: of each pool the numbers of the tokens that stay, int64, in any order."""
        most = max((len(k) for k in kept), default=0)
        return cls(torch.stack([torch.nn.functional.pad(k.sort().values, (0, most - len(k)), value=-1) for k in kept]))

    def apply(self, values: Tensor) -> Tensor:
        """[P, K, D] of values [P, N, D], in their dtype: gathered, or sums by weight made in FP32; 0 behind the last of a pool."""
        pools, kept = self.keep.shape
        real = self.keep >= 0
        if self.groups is None or self.weights is None:
            found = values.gather(1, self.keep.clamp(min=0)[..., None].expand(-1, -1, values.shape[2]))
            return found * real[..., None].to(values.dtype)
        # tokens that go nowhere are added to one row more, which is cut off
        to = torch.where(self.groups < 0, kept, self.groups) + (kept + 1) * torch.arange(pools, device=values.device)[:, None]
        out = torch.zeros(pools * (kept + 1), values.shape[2], dtype=torch.float32, device=values.device)
        out.index_add_(0, to.flatten(), (values.float() * self.weights[..., None]).flatten(0, 1))
        return out.view(pools, kept + 1, -1)[:, :kept].to(values.dtype)
