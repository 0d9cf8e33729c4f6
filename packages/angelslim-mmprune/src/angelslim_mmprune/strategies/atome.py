"""Pairs of neighbours are merged, the most alike first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from ..budget import Scope
from ..dpp import told_apart, unit
from ..finite import all_finite, require
from ..merging import plan_of_groups
from ..plan import Plan, Pool, before, of_host
from .base import Modality, Strategy


class AToMe(Strategy):
    """Of the pairs (0, 1), (2, 3)... the most alike are merged into their mean.

    Source: A-ToMe (arXiv:2306.16009), as Samp's paper runs it: on the projector's output. One round merges half of the tokens at most.
    Where fewer are to stay, the result is paired again, a token that is a mean counting for as many as went into it, as rounds in
    several layers do.
    """

    name = "atome"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})
    merges = True

    budget_scope: Scope = Field("image", description="what the budget is of: image is each clip; prompt: all clips, merged across their ends last")

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        device, tokens = pool.features.device, pool.features.shape[1]
        finite = all_finite(pool.valid, pool.features)
        group = torch.arange(tokens, device=device).expand(pool.valid.shape)
        sums = torch.where(pool.valid[..., None], pool.features.float(), 0)
        segments = None if pool.segments is None else torch.where(pool.valid, pool.segments, 0)
        left, goal = list(pool.counts), [max(k, 1) for k in keep]
        while any(n > k for n, k in zip(left, goal, strict=True)):
            merges = [max(0, min(n - k, n // 2)) for n, k in zip(left, goal, strict=True)]
            # a mean and a sum have one direction
            pairs = unit(sums[:, : sums.shape[1] // 2 * 2]).unflatten(1, (-1, 2))
            score = told_apart(pairs.prod(2).sum(2))
            if segments is not None:
                start = torch.zeros_like(group).scatter_reduce_(1, group, segments, "amax")[:, : sums.shape[1] // 2 * 2].unflatten(1, (-1, 2))
                score = torch.where(start[..., 0] == start[..., 1], score, score - 2**22)
            score = score.masked_fill(~before(of_host(left, device) // 2, score.shape[1]), -torch.inf)
            rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            joins = rank < of_host(merges, device)[:, None]
            opens = torch.ones(sums.shape[:2], dtype=torch.bool, device=device)
            opens[:, 1 : 2 * score.shape[1] : 2] = ~joins
            number = opens.cumsum(1) - 1
            group = number.gather(1, group.clamp(max=sums.shape[1] - 1))
            left = [n - m for n, m in zip(left, merges, strict=True)]
            sums = torch.zeros(len(left), max(left), sums.shape[2], device=device).scatter_add_(
                1, number.clamp(max=max(left) - 1)[..., None].expand(sums.shape), sums
            )
        opens = torch.nn.functional.pad(group[:, 1:] != group[:, :-1], (1, 0), value=True)
        plan = plan_of_groups(opens, pool.valid, keep)
        require(finite, 849, self.name)
        return plan
