"""SCOPE: tokens that attention names and that cover the others (arXiv 2510.24214, its set coverage and SCOPE score)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ..dpp import ascending
from ..kernels.greedy import GREEDY, Rule
from ..picking import LAYER_MEANING, check_finite, of_layer
from ..plan import Need, Plan, Pool
from .base import Modality, Strategy


class SaliencyCoverage(Strategy):
    """Keep tokens by how much they add to what kept ones cover, times the encoder's attention to them.

    Token j is covered by the largest cosine to a kept token, c_j, at least 0; token i adds sum_j max(0, cos_ij - c_j). All
    cosines of a pool are held, and twice where Triton does not run.
    """

    name = "scope"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    layer: int | None = Field(None, description=LAYER_MEANING)
    alpha: float = Field(1.0, ge=0, le=100, description="exponent of the attention; 0: coverage alone")
    combine: Literal["multiply", "add"] = Field("multiply", description="how attention and coverage make one score")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (of_layer(self.layer, "importance"),)

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        attention = pool.statistics[self.needs[0]].float()
        weight = attention.clamp(min=0) ** self.alpha
        rule: Rule = "covering" if self.combine == "multiply" else "covering_or"
        order = GREEDY(pool.features, weight, pool.counts, keep, rule)
        check_finite(pool, attention)
        return Plan(ascending(order, pool.features.shape[1]))
