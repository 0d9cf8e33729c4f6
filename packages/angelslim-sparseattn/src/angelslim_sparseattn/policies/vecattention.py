"""VecAttention: single keys whose score with the mean query comes near the running maximum."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..block_index import Lists
from ..estimators import block_sums, means, products
from ..patterns import own, sink
from ..prefill import Kept, Prefill
from ..selectors import running_gap
from .base import Policy

# the running maximum begins anew every GROUP keys and goes STEP keys at a time
GROUP = 256
STEP = 16
# bytes that keys looked at at a time take up
MEMORY = 2**28


class VecAttention(Policy):
    """Block 0, own blocks, and single keys within -ln(theta) of the running maximum."""

    looks_ahead: ClassVar[bool] = False

    theta: float = Field(0.1, ge=0, le=1, description="share of the running maximum's weight that a key needs; 0: everything is kept")

    def scratch_bytes(self, s: Prefill) -> int:
        return 16 * s.rows * s.kv_len

    def keep(self, s: Prefill) -> Kept:
        head = self.scratch_bytes(s)
        step = max(1, MEMORY * s.rows // head)  # rows of one head; as many heads as fit have all of theirs looked at at once
        found = [self._rows(part, slice(at, at + step)) for part in s.parts(MEMORY // head) for at in range(0, s.rows, step)]
        cells, counts, singles = zip(*found, strict=True)
        ends = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
        return Kept(torch.cat(cells).view(len(s.q), s.rows, s.columns), tokens=Lists(ends, torch.cat(singles)))

    def _rows(self, s: Prefill, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks [heads * rows, Pk], number of single keys of each row, and the keys; waits for the device, which knows how many there are."""
        gap = -math.log(self.theta) if self.theta else math.inf
        token = torch.arange(s.kv_len, dtype=torch.int32, device=s.q.device)
        scores = products(means(s.q, s.block)[:, rows], s.k.float()) * s.scale
        near = running_gap(scores.masked_fill_(token >= s.own_ends[0][rows, None] * s.block, -torch.inf), gap, GROUP, STEP)
        sizes = block_sums(torch.ones_like(token), s.block)
        whole = (block_sums(near.int(), s.block) == sizes) | (sink(s, 1) | own(s))[rows]
        near &= ~whole.repeat_interleave(s.block, -1)[..., : s.kv_len]
        return whole.flatten(0, 1), near.sum(-1).flatten(), token.expand_as(near)[near]
