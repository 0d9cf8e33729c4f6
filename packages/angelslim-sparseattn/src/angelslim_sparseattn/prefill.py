"""What policies look at and what they decide: one sequence without padding, and the blocks it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .block_index import Lists, own_blocks


class Span(NamedTuple):
    """Sizes that positions and budgets follow from: the last `q_len` of `kv_len` tokens are queries."""

    q_len: int
    kv_len: int
    block: int
    prompt_len: int

    @property
    def off(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    @property
    def rows(self) -> int:
        """Query blocks."""
        return -(-self.q_len // self.block)

    @property
    def columns(self) -> int:
        """Key blocks."""
        return -(-self.kv_len // self.block)


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
    def span(self) -> Span:
        return Span(self.q_len, self.kv_len, self.block, self.prompt_len)

    @property
    def off(self) -> int:
        """Position of the first query."""
        return self.span.off

    @property
    def groups(self) -> int:
        """Query heads a KV head."""
        return self.q.shape[0] // self.k.shape[0]

    @property
    def rows(self) -> int:
        """Query blocks."""
        return self.span.rows

    @property
    def columns(self) -> int:
        """Key blocks."""
        return self.span.columns

    def parts(self, heads: int) -> Iterator[Prefill]:
        """The sequence by no more than so many query heads at a time, in their order."""
        groups = self.groups
        step = max(1, min(heads, len(self.q)))
        step = step // groups * groups if step >= groups else max(n for n in range(1, step + 1) if groups % n == 0)
        for start in range(0, len(self.q), step):
            kv = slice(start // groups, (start + step - 1) // groups + 1)
            yield replace(self, q=self.q[start : start + step], k=self.k[kv], v=self.v[kv])

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
    """A policy's decision for one sequence: cells or lists.

    Attributes:
        cells: bool [Hq, Pq, Pk], or [Pq, Pk] for all heads; own blocks and causality are seen to by `select`.
        lists: causal, with own blocks in them.
        tokens: positions of single keys, a list for each row.
        delta: see `BlockIndex`.
    """

    cells: Tensor | None = None
    lists: Lists | None = None
    tokens: Lists | None = None
    delta: float = -1.0
