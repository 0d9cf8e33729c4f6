"""CoSA: XAttention's scores, blocks that own a row's maximum first, and a skip while attention runs.

Source: arXiv:2607.25291.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ..estimators import antidiagonal_cells, real_groups
from ..patterns import causal, own, sink
from ..prefill import Kept, Prefill
from ..selectors import top_p
from .base import Policy
from .strided import Stride

# a block within this of a row's highest score owns its maximum
OWNS = 0.999


class CoSA(Policy):
    """Own blocks, block 0, owners of row maxima by mass, the rest by mass, while the mass before is below a share p."""

    looks_ahead: ClassVar[bool] = False

    p: float = Field(0.95, ge=0, le=1, description="share of the estimated mass to keep")
    delta: float = Field(1000, description="blocks below ln(delta / N) of the running maximum are skipped; negative: none")
    stride: Stride = 8

    def keep(self, s: Prefill) -> Kept:
        mass = s.q.new_zeros(len(s.q), s.rows, s.columns, dtype=torch.float32)
        owner = torch.zeros_like(mass, dtype=torch.bool)
        for head, blocks, x in antidiagonal_cells(s, self.stride):
            highest = x.amax(-1)
            share = (highest - highest.amax(-1, keepdim=True)).exp() * real_groups(s, self.stride, blocks)[..., None]
            mass[head, blocks] = share.sum(1)
            owner[head, blocks] = (share >= OWNS).any(1)
        tier = torch.where(sink(s, 1) | own(s), 0, torch.where(owner, 1, 2))
        cells, rank = top_p(mass, self.p, tier, causal(s))
        return Kept(cells, rank, delta=self.delta)
