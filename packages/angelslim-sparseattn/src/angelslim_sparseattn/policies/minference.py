"""MInference's vertical-slash heads: columns and diagonals that the last queries look at.

Source: arXiv:2407.02490.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..estimators import diagonal_sums, last_attention
from ..patterns import causal, own
from ..prefill import Kept, Prefill
from .base import Policy

QUERIES = 64
FIRST_COLUMNS = 30
NEAR_DIAGONALS = 100


class MInference(Policy):
    """Columns and diagonals that the last 64 queries look at: columns as single keys, diagonals as the blocks they cross."""

    looks_ahead: ClassVar[bool] = True

    vertical: int = Field(1000, ge=0, description="columns a head, no fewer than 30")
    slash: int = Field(6096, ge=0, description="diagonals a head, no fewer than 50")

    def keep(self, s: Prefill) -> Kept:
        attention = last_attention(s, QUERIES)
        columns, diagonals = attention.sum(1), diagonal_sums(attention)
        columns[:, :FIRST_COLUMNS] = torch.inf
        diagonals[:, :NEAR_DIAGONALS] = torch.inf
        columns = _top(columns, min(s.kv_len, max(self.vertical, 30)))
        cells = crossed(s, _top(diagonals, min(s.kv_len, max(self.slash, 50)))) | own(s)
        counts, singles = [], []
        for head, chosen in enumerate(columns):
            key = chosen.nonzero()[:, 0]
            block = key // s.block
            alone = ~cells[head][:, block] & (causal(s)[:, block])
            counts.append(alone.sum(-1))
            singles.append(key.expand_as(alone)[alone])
        return Kept(cells, token_counts=torch.stack(counts), tokens=torch.cat(singles).int())


def _top(score: Tensor, k: int) -> Tensor:
    chosen = score.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)


def crossed(s: Prefill, diagonals: Tensor) -> Tensor:
    """Blocks [Hq, Pq, Pk] that any of the diagonals [Hq, N] crosses; diagonal o joins each query to the key o before it."""
    until = torch.nn.functional.pad(diagonals.cumsum(-1), (1, 0))
    end = (s.start_P1 + s.block).clamp(max=s.kv_len) - 1
    nearest = (s.start_P1 - (s.j * s.block + s.block - 1)).clamp(0, s.kv_len)
    farthest = (end - s.j * s.block + 1).clamp(0, s.kv_len)
    return (until[:, farthest] - until[:, nearest] > 0) & causal(s)
