"""Neighbours that sound alike are merged, the most alike first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..budget import Scope
from ..dpp import told_apart, unit
from ..finite import all_finite, require
from ..merging import plan_of_groups
from ..plan import Plan, Pool, before, of_host
from .base import Modality, Strategy


class FastAdaSP(Strategy):
    """The N - K most alike pairs of neighbours are merged, chains of them into one, as plain means.

    Source: arXiv:2410.03007, as Samp's paper runs it: on the projector's output, once. The original merges keys inside layers of the
    language model, layer by layer, weighted by attention.
    """

    name = "fastadasp"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})
    merges = True

    budget_scope: Scope = Field("image", description="what the budget is of: image is each clip; prompt: all clips, merged across their ends last")

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        counts, budget = of_host(pool.counts, pool.features.device), of_host(keep, pool.features.device)
        finite = all_finite(pool.valid, pool.features)
        joins = most_alike(unit(pool.features), counts, counts - budget.clamp(min=1), pool.segments)
        plan = plan_of_groups(~joins, pool.valid, keep)
        require(finite, 848, self.name)
        return plan


def most_alike(x: Tensor, counts: Tensor, merges: Tensor, segments: Tensor | None) -> Tensor:
    """Which tokens [P, N] join the one before them: so many of a clip as `merges` [P] says; ties go to the first.

    Args:
        x: [P, N, D], of length 1.
        counts: [P].
        segments: [P, N]: pairs of two segments come last.
    """
    valid = before(counts, x.shape[1])
    score = told_apart((x[:, 1:] * x[:, :-1]).sum(2))
    if segments is not None:
        score = torch.where(segments[:, 1:] == segments[:, :-1], score, score - 2**22)
    score = score.masked_fill(~valid[:, 1:], -torch.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.nn.functional.pad((rank < merges[:, None]) & valid[:, 1:], (1, 0))
