"""What policies look at and what they decide: one sequence without padding, and the blocks it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .block_index import own_blocks


@dataclass(frozen=True, eq=False)
class Prefill:
    """One sequence.

    Args:
        q: [Hq, L, D], the last L positions.
        k, v: [Hkv, N, D] and [Hkv, N, Dv].
        scale: what scores are multiplied by.
        block: queries and keys a block.
        prompt_len: length of the whole prompt, of which keys so far are a part.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    block: int
    prompt_len: int

    @property
    def q_len(self) -> int:
        return self.q.shape[1]

    @property
    def kv_len(self) -> int:
        return self.k.shape[1]

    @property
    def off(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    @property
    def groups(self) -> int:
        """Query heads a KV head."""
        return self.q.shape[0] // self.k.shape[0]

    @property
    def rows(self) -> int:
        """Query blocks."""
        return -(-self.q_len // self.block)

    @property
    def columns(self) -> int:
        """Key blocks."""
        return -(-self.kv_len // self.block)

    @cached_property
    def own_ends(self) -> tuple[Tensor, Tensor]:
        """First and last own block [Pq]."""
        return own_blocks(self.q_len, self.kv_len, self.block, self.block, self.q.device)

    @property
    def last_P1(self) -> Tensor:
        return self.own_ends[1][:, None]

    @cached_property
    def j(self) -> Tensor:
        """Numbers of key blocks [Pk]."""
        return torch.arange(self.columns, device=self.q.device)

    @cached_property
    def start_P1(self) -> Tensor:
        """Position of each query block's first query [Pq, 1]."""
        return (self.off + torch.arange(0, self.q_len, self.block, device=self.q.device))[:, None]


class Kept(NamedTuple):
    """A policy's decision for one sequence.

    Attributes:
        cells: bool [Hq, Pq, Pk], or [Pq, Pk] for all heads; own blocks and causality are seen to by `select`.
        rank: int [Hq, Pq, Pk], low before high: blocks in order of importance; None: ascending.
        token_counts, tokens: single keys of each row [Hq, Pq] and their positions one row after the other, int32.
        delta: see `BlockIndex`.
    """

    cells: Tensor
    rank: Tensor | None = None
    token_counts: Tensor | None = None
    tokens: Tensor | None = None
    delta: float = -1.0
