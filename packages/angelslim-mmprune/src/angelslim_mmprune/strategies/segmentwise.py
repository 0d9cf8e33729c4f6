"""The tokens that the encoder attends to most, of every stretch of time as many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from ..budget import Scope
from ..dpp import before, chosen, of_host
from ..finite import all_finite, require
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
        of_token, starts, quotas = [], [], []
        for count, kept in zip(pool.counts, keep, strict=True):
            parts = max(1, min(self.segments, count))
            sizes = [count // parts + (s < count % parts) for s in range(parts)]
            # the first are the largest
            quota = [kept // parts + (s < kept % parts) for s in range(parts)]
            of_token += [s for s, size in enumerate(sizes) for _ in range(size)] + [parts] * (tokens - count)
            starts += [sum(sizes[:s]) for s in range(parts) for _ in range(sizes[s])] + [count] * (tokens - count)
            quotas += [quota[s] for s in range(parts) for _ in range(sizes[s])] + [0] * (tokens - count)
        segment, start, most = (of_host(values, device).view(score.shape) for values in (of_token, starts, quotas))
        # by segment, in it by score; ties go to the lower index
        order = score.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, segment.gather(1, order).argsort(dim=1, stable=True))
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(tokens, device=device).expand(order.shape))
        plan = Plan(chosen((rank - start < most) & before(of_host(pool.counts, device), tokens), max(keep)))
        require(finite, 846, self.name)
        return plan
