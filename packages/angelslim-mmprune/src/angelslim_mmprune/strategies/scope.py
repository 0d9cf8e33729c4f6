"""SCOPE: tokens that attention names and that cover the others (arXiv 2510.24214, its set coverage and SCOPE score)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..picking import LAYER_MEANING, check_finite, kept, of_layer, one_by_one, unit
from ..plan import Need, Plan, Pool
from .base import Modality, Strategy


class SaliencyCoverage(Strategy):
    """Keep tokens by how much they add to what kept ones cover, times the encoder's attention to them.

    Token j is covered by the largest cosine to a kept token, c_j, at least 0; token i adds sum_j max(0, cos_ij - c_j). O(K N^2), and the
    cosines of a pool are held twice.
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
        rows = unit(pool.features, pool.valid)
        cosines = rows @ rows.mT  # symmetric; 0 to what is no token, which so covers nothing and is covered by nothing
        uncovered = torch.empty_like(cosines)
        covered = torch.zeros_like(rows[..., 0])
        pools = torch.arange(len(rows), device=rows.device)

        def scores() -> Tensor:
            gain = torch.sub(cosines, covered[:, None], out=uncovered).clamp_(min=0).sum(-1)
            return gain * weight if self.combine == "multiply" else gain + weight

        def after(token: Tensor) -> Tensor:
            torch.maximum(covered, cosines[pools, token], out=covered)
            return scores()

        chosen = one_by_one(pool.valid, keep, scores(), after)
        check_finite(pool, attention)
        return Plan(kept(chosen, keep))
