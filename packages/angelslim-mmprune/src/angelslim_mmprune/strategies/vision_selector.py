"""VisionSelector: the tokens that a learned scorer finds best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import model_validator

from ..finite import all_finite, require
from ..plan import Plan, Pool
from .learned import Learned


class VisionSelector(Learned):
    """Keep the tokens of the highest learned scores.

    Source: arXiv:2510.16598 §3.
    """

    name = "vision_selector"

    @model_validator(mode="after")
    def _has_scores(self) -> VisionSelector:
        if self.scorer is None:
            raise ValueError("needs the folder of a scorer; train one, or use a strategy without")
        return self

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        scores = self.scores(pool)
        order = torch.where(pool.valid, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
        plan = Plan.of([order[p, :k] for p, k in enumerate(keep)])
        require(all_finite(pool.valid, scores), 837, "vision_selector")
        return plan
