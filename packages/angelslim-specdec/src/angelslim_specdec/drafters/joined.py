"""A decoder layer of a draft as decoding runs it: weights that read the same are joined, and what stands between products is one launch each.

Shapes: B rows, T tokens, H hidden, I inner width of the MLP, h heads of queries, g of keys and values, D of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import layer as kernels

if TYPE_CHECKING:
    from ..drafts.layers import MLP, Attention, RMSNorm
    from ..kernels.layer import HeadNorms


class JoinedLayer:
    """Copies weights, so that a draft that was trained further needs a new one.

    Args:
        attention: projections.
        norm: between attention and MLP.
    """

    @torch.no_grad()
    def __init__(self, attention: Attention, norm: RMSNorm, mlp: MLP) -> None:
        self._attention, self._norm, self._mlp = attention, norm, mlp
        parts = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        self.projections = torch.cat(parts)
        self._heads = [len(part) // attention.head_dim for part in parts]
        self._gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        q_norm, k_norm = attention.q_norm, attention.k_norm
        self.head_norms: HeadNorms | None = None if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight, q_norm.eps, "once")

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, h, D], keys and values [B, T, g, D] of what attention reads, before norms of heads and RoPE."""
        q, k, v = functional.linear(x, self.projections).unflatten(-1, (-1, self._attention.head_dim)).split(self._heads, -2)
        return q, k, v

    def finish(self, attended: Tensor, residual: Tensor, last: RMSNorm) -> tuple[Tensor, Tensor]:
        """What the layer puts out [B, T, H], and its norm by `last`, of what attention found [B, h, T, D] and what it is added to."""
        hidden, read = kernels.ADD_NORM(self._attention.out(attended), residual, self._norm.weight, self._norm.eps)
        gate, up = functional.linear(read, self._gate_up).chunk(2, -1)
        added = self._mlp.down_proj(kernels.GATED(gate, up))
        out: tuple[Tensor, Tensor] = kernels.ADD_NORM(added, hidden, last.weight, last.eps)
        return out
