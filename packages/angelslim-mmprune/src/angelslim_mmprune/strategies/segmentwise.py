"""The tokens that the encoder attends to most, of every stretch of time as many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from ..budget import Scope
from ..finite import all_finite, require
from ..picking import kept
from ..plan import Need, Plan, Pool
from .base import Modality, Strategy


class Segmentwise(Strategy):
    """Top tokens by attention within each of S segments of time.

    Source: arXiv:2511.14293: floor(K / S) of each segment. What that leaves of K goes to the largest segments, one each, the first of
    equal ones first; a clip of fewer tokens than segments has a segment for each.
    """

    name = "segmentwise"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})

    budget_scope: Scope = Field("image", description="what the budget is of, and what is cut into segments: image is each clip")
    segments: int = Field(10, ge=1, le=2**20, description="stretches of time, of equal length, a token more in the first where it does not divide")
    layer: int = Field(-1, description="encoder layer whose attention is looked at; -1: the last")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("encoder", self.layer, "received"),)

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        score = pool.statistics[self.needs[0]].float()
        tokens, device = score.shape[1], score.device
        finite = all_finite(pool.valid, score)
        rows = []
        for count, stay in zip(pool.counts, keep, strict=True):
            parts = torch.arange(max(1, min(self.segments, count)))
            # the first are the largest
            size, quota = (whole // len(parts) + (parts < whole % len(parts)).long() for whole in (count, stay))
            of_token = torch.stack([parts, size.cumsum(0) - size, quota]).repeat_interleave(size, 1)
            rows.append(torch.nn.functional.pad(of_token, (0, tokens - count), value=tokens))
        segment, start, most = torch.stack(rows, 1).to(device, non_blocking=True)
        # by segment, in it by score; ties go to the lower index
        order = score.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, segment.gather(1, order).argsort(dim=1, stable=True))
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(tokens, device=device).expand(order.shape))
        plan = Plan(kept((rank - start < most) & pool.valid, keep))
        require(finite, 846, self.name)
        return plan
