"""VisPruner: half by attention, half by dropping near copies (arXiv 2412.01818, its important and diverse tokens)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from ..budget import Scope
from ..kernels.distinct import DISTINCT
from ..picking import LAYER_MEANING, check_finite, kept, numbers, of_layer, ranks
from ..plan import Need, Plan, Pool, Statistic
from .base import Strategy


class VisPruner(Strategy):
    """Keep the tokens that attention names, and of the others those that have no near copy.

    round(important K) tokens have the largest attention. The rest, in order, is split into every other token and those between; the `step` of
    the former that are closest to one of the latter go, until K tokens are left. Cosines are of the features as the language model gets
    them, where the published code takes those before the projector.
    """

    name = "vispruner"

    budget_scope: Scope = Field("image", description="what the budget is of: prompt; image: its share of the prompt's; frame: of a video's")
    layer: int | None = Field(None, description=LAYER_MEANING)
    important: float = Field(0.5, ge=0, le=1, description="share of the kept tokens that attention chooses")
    step: int = Field(8, ge=1, le=2**20, description="most tokens that go at once")

    @property
    def statistic(self) -> Statistic:
        """Of the encoder's attention, that says what is important."""
        return "importance"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (of_layer(self.layer, self.statistic),)

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        attention = pool.statistics[self.needs[0]].float()
        important = [round(self.important * count) for count in keep]
        named = pool.valid & (ranks(attention, pool.valid) < numbers(important, pool)[:, None])
        others = [n - i for n, i in zip(pool.counts, important, strict=True)]
        diverse = [k - i for k, i in zip(keep, important, strict=True)]
        rest = DISTINCT(pool.features, kept(pool.valid & ~named, others), pool.counts, others, diverse, self.step)
        none = pool.features.shape[1]
        chosen = torch.nn.functional.pad(named, (0, 1)).scatter_(1, torch.where(rest < 0, none, rest), True)[:, :-1]
        check_finite(pool, attention)
        return Plan(kept(chosen, keep))
