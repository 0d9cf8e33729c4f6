"""VisionZip: dominant tokens by attention, the others merged into evenly spread ones by their keys (arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ..budget import Scope
from ..picking import LAYER_MEANING, check_finite, kept, numbers, of_layer, ranks, unit
from ..plan import Need, Plan, Pool
from .base import Strategy


class VisionZip(Strategy):
    """Keep the dominant tokens that attention names; merge each other one into the contextual token whose key is most like its own.

    Of K kept tokens max(1, round(contextual K)) are contextual: evenly spread over those that are not dominant. The published code
    merges before the projector, this after it.
    """

    name = "visionzip"
    merges: ClassVar[bool] = True

    budget_scope: Scope = Field("image", description="what the budget is of: prompt; image: its share of the prompt's; frame: of a video's")
    layer: int | None = Field(None, description=LAYER_MEANING)
    contextual: float = Field(10 / 64, ge=0, le=1, description="share of the kept tokens that others are merged into; at least one is")
    merge: Literal["sum", "mean"] = Field("sum", description="sum: contextual token + mean of those merged into it, as published; mean: of them all")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (of_layer(self.layer, "importance"), of_layer(self.layer, "keys"))

    def contexts(self, tokens: int, keep: int) -> int:
        """How many of `keep` kept tokens of a pool are contextual."""
        return min(keep, max(1, round(self.contextual * keep)))

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        attention, keys = (pool.statistics[need].float() for need in self.needs)
        contexts = [self.contexts(n, k) for n, k in zip(pool.counts, keep, strict=True)]
        steps = [max(1, (n - k + c) // c) if c else 1 for n, k, c in zip(pool.counts, keep, contexts, strict=True)]
        count = numbers(contexts, pool)[:, None]
        dominant = pool.valid & (ranks(attention, pool.valid) < (numbers(keep, pool)[:, None] - count))
        others = pool.valid & ~dominant
        place = others.cumsum(1) - 1  # of each among those that are not dominant
        step = numbers(steps, pool)[:, None]
        target = others & (place % step == 0) & (place // step < count)

        targets = kept(target, [max(1, c) for c in contexts])  # [P, C]
        numbered = torch.arange(pool.features.shape[1], device=attention.device).expand_as(target)
        rows = unit(keys, pool.valid)
        cosines = rows @ rows.gather(1, targets.clamp(min=0)[..., None].expand(-1, -1, rows.shape[2])).mT
        cosines.masked_fill_((targets < 0)[:, None], -torch.inf)
        into = torch.where(dominant | target, numbered, targets.gather(1, cosines.argmax(-1)).clamp(min=0))  # [P, N]: the kept token each becomes
        chosen = dominant | target
        groups = (chosen.cumsum(1) - 1).gather(1, into).masked_fill(~pool.valid, -1)

        merged = others & ~target
        members = torch.zeros_like(attention).scatter_add_(1, into, merged.float()).gather(1, into)  # of a token's group, the kept one left out
        if self.merge == "sum":
            weights = torch.where(merged, 1 / members.clamp(min=1), 1.0)
        else:
            weights = 1 / (members + 1)
        check_finite(pool, attention, keys)
        return Plan(kept(chosen, keep), groups, weights)
