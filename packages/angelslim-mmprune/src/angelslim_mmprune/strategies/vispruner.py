"""VisPruner: half by attention, half by dropping near copies (arXiv 2412.01818, its important and diverse tokens)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..budget import Scope
from ..picking import LAYER_MEANING, Cosines, check_finite, kept, numbers, of_layer, ranks, unit
from ..plan import Need, Plan, Pool, Statistic, of_host
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
        rest = _distinct(Cosines(unit(pool.features, pool.valid)), kept(pool.valid & ~named, others), others, diverse, self.step)
        chosen = torch.nn.functional.pad(named, (0, 1)).scatter_(1, rest, True)[:, :-1]
        check_finite(pool, attention)
        return Plan(kept(chosen, keep))


def _distinct(cosines: Cosines, rest: Tensor, counts: Sequence[int], wanted: Sequence[int], step: int) -> Tensor:
    """Of tokens `rest` [P, R], ascending and -1 behind, those that stay when the near copies are gone, N behind.

    Args:
        counts: how many of each pool there are.
        wanted: how many are to stay.
    """
    none = cosines.rows.shape[1]
    rest = rest.masked_fill(rest < 0, none)
    left = [n if k else 0 for n, k in zip(counts, wanted, strict=True)]
    rounds = []  # how many of each pool there are, and how many of them go
    while any(n > k for n, k in zip(left, wanted, strict=True)):
        # of two tokens or more at least one goes; one alone is only ever left where one is wanted
        gone = [min(step, n // 2, n - k) for n, k in zip(left, wanted, strict=True)]
        rounds.append((max(left), gone))
        left = [n - r for n, r in zip(left, gone, strict=True)]
    empty = of_host([not k for k in wanted], rest.device).bool()
    rest = rest.masked_fill(empty[:, None], none)
    drops = of_host([n for _, gone in rounds for n in gone], rest.device).view(-1, len(left))  # one copy to the device for all rounds
    for (most, _), drop in zip(rounds, drops, strict=True):
        rest = rest[:, :most]
        these, those = rest[:, ::2], rest[:, 1::2]
        near = cosines.between(these.clamp(max=none - 1), those.clamp(max=none - 1)).masked_fill_((those == none)[:, None], -torch.inf)
        goes = ranks(near.amax(-1), these < none) < drop[:, None]
        rest = torch.cat([these.masked_fill(goes, none), those], 1).sort(1).values
    return rest[:, : max(left)]
