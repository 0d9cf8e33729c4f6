"""VecAttention: single keys whose score with the mean query comes near the running maximum."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from ..estimators import block_sums, means, products
from ..patterns import own, sink
from ..prefill import Kept, Prefill
from ..selectors import running_gap
from .base import Policy

# the running maximum begins anew every GROUP keys and goes STEP keys at a time
GROUP = 256
STEP = 16


class VecAttention(Policy):
    """Block 0, own blocks, and single keys within -ln(theta) of the running maximum."""

    looks_ahead: ClassVar[bool] = False

    theta: float = Field(0.1, ge=0, le=1, description="share of the running maximum's weight that a key needs; 0: everything is kept")

    def keep(self, s: Prefill) -> Kept:
        gap = -math.log(self.theta) if self.theta else math.inf
        queries, keys = means(s.q, s.block), s.k.float()
        token = torch.arange(s.kv_len, device=queries.device)
        before = token < s.own_ends[0][:, None] * s.block
        sizes = block_sums(torch.ones_like(token), s.block)
        cells, counts, singles = [], [], []
        for head in range(len(queries)):
            kv = head // s.groups
            scores = products(queries[head : head + 1], keys[kv : kv + 1])[0] * s.scale
            near = running_gap(scores.masked_fill(~before, -torch.inf), gap, GROUP, STEP)
            whole = (block_sums(near.int(), s.block) == sizes) | sink(s, 1) | own(s)
            near &= ~whole.repeat_interleave(s.block, -1)[:, : s.kv_len]
            cells.append(whole)
            counts.append(near.sum(-1))
            singles.append(near.nonzero()[:, 1])
        return Kept(torch.stack(cells), token_counts=torch.stack(counts), tokens=torch.cat(singles).int())
