"""XAttention: blocks by the attention of antidiagonal sums, as many as hold a share of it.

Source: arXiv:2503.16428.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..estimators import antidiagonal_cells, real_groups
from ..patterns import causal, own, sink
from ..prefill import Kept, Prefill
from ..selectors import top_p
from .base import Policy
from .strided import Stride


def antidiagonal_mass(s: Prefill, stride: int) -> Tensor:
    """[Hq, Pq, Pk]: softmax of each row of antidiagonal scores, summed over blocks and rows that have queries."""
    mass = s.q.new_zeros(len(s.q), s.rows, s.columns, dtype=torch.float32)
    for head, blocks, x in antidiagonal_cells(s, stride):
        shares = x.flatten(2).softmax(-1).view_as(x).sum(-1)
        mass[head, blocks] = (shares * real_groups(s, stride, blocks)[..., None]).sum(1)
    return mass


class XAttention(Policy):
    """Block 0, own blocks, and the heaviest while the mass before is below a share tau."""

    looks_ahead: ClassVar[bool] = False

    tau: float = Field(0.9, ge=0, le=1, description="share of the estimated attention to keep")
    stride: Stride = 8

    def keep(self, s: Prefill) -> Kept:
        tier = torch.where(sink(s, 1) | own(s), 0, 1)
        return Kept(top_p(antidiagonal_mass(s, self.stride), self.tau, tier, causal(s))[0])
