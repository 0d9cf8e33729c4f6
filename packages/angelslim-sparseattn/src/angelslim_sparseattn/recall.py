"""How much of dense attention an index keeps: the share of its weight, exact, from logarithms of denominators.

Shapes: Hq query heads, L queries, which are the last of N keys; one sequence.
Source: softmax over kept keys and over all differ by a factor a row, the kept weight, which is exp(LSE of kept - LSE of all).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import sparse_attention
from .block_index import BlockIndex, own_blocks

# values of an output that are compared at a time
_PIECE = 1 << 26


def everything(q: Tensor, k: Tensor, block: int = 128) -> BlockIndex:
    """All blocks of causal attention: an executor's dense form. Lists are shared by the query heads of a KV head."""
    last = own_blocks(q.shape[2], k.shape[2], block, block, q.device)[1]
    cells = torch.arange(-(-k.shape[2] // block), device=q.device) <= last[:, None]
    shape = (q.shape[0], k.shape[1], *cells.shape)
    return BlockIndex.from_bool(cells.expand(shape), (q.shape[2],) * len(q), (k.shape[2],) * len(q), block, block, "per_kv")


def densities(index: BlockIndex) -> Tensor:
    """Kept blocks, a single key counting as its share of one, over those of causal attention, a list each: fp64 [H] of the batch's first sequence."""
    lists, rows = index.shape[1:3]
    kept = index.row_ptr.diff().double()
    if index.tokens is not None:
        kept = kept + index.tokens.ptr.diff().double() / index.block_n
    causal = (index.own()[1][0] + 1).clamp(min=0).sum()
    return kept.view(-1, lists, rows)[0].sum(-1) / causal


def low(values: Tensor, share: float = 0.05) -> Tensor:
    """Quantile over the last dimension, of any length: the value that this share of them does not exceed."""
    return values.kthvalue(max(1, round(share * values.shape[-1])), dim=-1).values


@dataclass(frozen=True)
class Dense:
    """Attention over everything.

    Args:
        out: [1, Hq, L, Dv].
        lse: natural logarithm of the denominators [1, Hq, L], fp32.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, scale: float, block: int = 128) -> Dense:
        """By the executor of block indices that takes the call, whichever computes what it is compared with."""
        return cls(*sparse_attention(q, k, v, everything(q, k, block), "auto", True, scale=scale, check=False))

    def recall(self, lse: Tensor) -> Tensor:
        """Kept share [Hq, L] of each row's weight, given the LSE over what is kept."""
        return (lse - self.lse)[0].exp()

    def error(self, out: Tensor) -> float:
        """|out - dense| / |dense|, over all heads and rows."""
        pairs = zip(out.flatten().split(_PIECE), self.out.flatten().split(_PIECE), strict=True)
        sums = [((a.float() - b.float()).square().sum(dtype=torch.float64), b.float().square().sum(dtype=torch.float64)) for a, b in pairs]
        apart, whole = (torch.stack(s).sum() for s in zip(*sums, strict=True))
        return float((apart / whole).sqrt())
