"""Samp: neighbours that sound alike are merged, then a DPP prunes to the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from ..budget import Scope
from ..merging import THRESHOLD, samp_plan
from ..plan import Need, Plan, Pool
from .base import Modality, Strategy


class Samp(Strategy):
    """Merge neighbours in time by similarity, then prune by relevance and diversity.

    Source: Samp (preprint 202606.0741): merge weights are what tokens receive in the encoder's last layer, of the heads' highest, and
    relevance is what they give themselves there, of the heads' mean.
    """

    name = "samp"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})
    merges = True

    budget_scope: Scope = Field("image", description="what the budget is of: image is each clip; prompt: all clips, whose groups stay apart")
    threshold: float = Field(THRESHOLD, ge=-1, le=2, description="mean cosine to the open group from which on a token joins it; above 1: nothing is merged")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("encoder", -1, "pooled_max"), Need("encoder", -1, "pooled_diagonal"))

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        received, own = (pool.statistics[need] for need in self.needs)
        return samp_plan(pool.features, received, own, pool.counts, keep, self.threshold, pool.segments)
