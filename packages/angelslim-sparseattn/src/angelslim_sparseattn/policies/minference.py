"""MInference's vertical-slash heads: columns and diagonals that the last queries look at.

Source: arXiv:2407.02490.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..estimators import diagonal_sums, last_attention
from ..kernels.select_rows import COMPACT
from ..patterns import causal, own
from ..prefill import Kept, Prefill
from .base import MOST_TOKENS, Policy

QUERIES = 64
FIRST_COLUMNS = 30
NEAR_DIAGONALS = 100


class MInference(Policy):
    """Columns and diagonals that the last 64 queries look at: columns as single keys, diagonals as the blocks they cross."""

    looks_ahead: ClassVar[bool] = True

    vertical: int = Field(1000, ge=0, le=MOST_TOKENS, description="columns a head, no fewer than 30")
    slash: int = Field(6096, ge=0, le=MOST_TOKENS, description="diagonals a head, no fewer than 50")

    def scratch_bytes(self, s: Prefill) -> int:
        return 12 * QUERIES * s.kv_len + 40 * s.rows * s.columns

    def keep(self, s: Prefill) -> Kept:
        attention = last_attention(s, QUERIES)
        columns, diagonals = attention.sum(1), diagonal_sums(attention)
        columns[:, :FIRST_COLUMNS] = torch.inf
        diagonals[:, :NEAR_DIAGONALS] = torch.inf
        keys = columns.sort(dim=-1, descending=True, stable=True).indices[:, : min(s.kv_len, max(self.vertical, 30))].sort().values
        cells = (crossed(s, _top(diagonals, min(s.kv_len, max(self.slash, 50)))) | own(s)) & causal(s)
        # a key stands alone in rows that do not keep its block and are not before it
        block = keys // s.block
        alone = ~cells.gather(-1, block[:, None].expand(-1, s.rows, -1)) & (block[:, None] <= s.last_P1)
        return Kept(cells, tokens=COMPACT(s, alone, False, keys))


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
