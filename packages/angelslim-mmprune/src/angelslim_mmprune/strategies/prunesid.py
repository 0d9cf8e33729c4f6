"""PruneSID: groups of tokens by principal components, in each the important ones that are not alike (arXiv 2603.09480, PSCA and intra-group NMS).

Thresholds and how many of each group stay are those of its released code. That the budget follows an image's complexity is left out:
budgets are exact here. The released code takes components of the encoder's output, and a random start that differs from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..budget import Scope
from ..picking import LAYER_MEANING, check_finite, kept, of_layer, unit
from ..plan import Need, Plan, Pool, of_host
from .base import Modality, Strategy

# up to so many tokens, or so wide features, components are exact; above, of a subspace iteration from a fixed start
EXACT = 1024
# in which tokens are settled before the host waits to hear whether all are
ROUNDS = 4


class PruneSID(Strategy):
    """Keep some of each group of tokens that load most on the same principal component of the sigmoid of their features.

    There are K / 4 groups. In each, tokens come by score; one whose cosine to an earlier one exceeds `threshold` K / N, at least 1, times the
    mean cosine of all pairs comes behind those that do not. Groups get a token each, and more by how many passed. One pool at a
    time, and each waits for the device: how many pass decides what follows.
    """

    name = "prunesid"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    budget_scope: Scope = Field("image", description="what the budget is of: prompt; image: its share of the prompt's; frame: of a video's")
    layer: int | None = Field(None, description=LAYER_MEANING)
    score: Literal["attention", "loading"] = Field(
        "attention", description="attention: of the encoder, as published for LLaVA; loading: on the group's component, as for Qwen2-VL"
    )
    threshold: float = Field(18.0, gt=0, le=1e6, description="times K / N times the mean cosine: from where on tokens of a group are alike")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (of_layer(self.layer, "importance"),) if self.score == "attention" else ()

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        check_finite(pool, *(pool.statistics[need] for need in self.needs))  # before: a decomposition does not end well with NaN
        chosen = torch.zeros_like(pool.valid)
        for number, (tokens, count) in enumerate(zip(pool.counts, keep, strict=True)):
            attention = [pool.statistics[need][number, :tokens].float() for need in self.needs]
            chosen[number, :tokens] = self._of_one(pool.features[number, :tokens], attention, count)
        return Plan(kept(chosen, keep))

    def _of_one(self, features: Tensor, attention: Sequence[Tensor], keep: int) -> Tensor:
        """Which of [N, D] stay, bool [N]."""
        tokens = len(features)
        load = loadings(features, max(1, keep // 4))
        largest = load.max(1)
        group, score = largest.indices, attention[0] if attention else largest.values
        rows = unit(features[None], torch.ones(1, tokens, dtype=torch.bool, device=features.device))[0]
        cosines = rows @ rows.T
        mean = (cosines.sum() - cosines.diagonal().sum()) / max(1, tokens * (tokens - 1))
        alike = (cosines > max(self.threshold * keep / tokens, 1) * mean) & (group[:, None] == group)
        passed = _passed(alike, score)

        # of each group those that passed by score, then the others by score
        order = torch.argsort(score, descending=True, stable=True)
        order = order[torch.argsort((~passed[order]).long(), stable=True)]
        order = order[torch.argsort(group[order], stable=True)]
        counts = group.new_zeros(load.shape[1]).scatter_add_(0, group, torch.ones_like(group))
        own, stayed = torch.stack([counts, torch.zeros_like(counts).scatter_add_(0, group, passed.long())]).tolist()  # one wait
        shares = shared(own, stayed, keep)
        place = torch.arange(tokens, device=order.device) - (counts.cumsum(0) - counts)[group[order]]
        chosen = torch.zeros(tokens, dtype=torch.bool, device=order.device)
        chosen[order] = place < of_host(shares, order.device)[group[order]]
        return chosen


def loadings(features: Tensor, components: int) -> Tensor:
    """[N, C]: how much each token loads on each component of the sigmoid of [N, D], features being the samples; at most N or D components."""
    centred = torch.sigmoid(features.float())
    centred = centred - centred.mean(1, keepdim=True)
    tokens, width = features.shape
    components = min(components, tokens, width)
    if min(tokens, width) <= EXACT:
        centred = centred.double()
        values, vectors = torch.linalg.eigh(centred @ centred.T if tokens <= width else centred.T @ centred)
        values, vectors = values.flip(0)[:components].clamp(min=0).sqrt(), vectors.flip(1)[:, :components]
        left = vectors if tokens <= width else centred @ vectors / values.clamp(min=1e-30)
    else:
        basis = torch.linalg.qr(centred @ _start(width, components, features.device)).Q
        for _ in range(2):
            basis = torch.linalg.qr(centred @ (centred.T @ basis)).Q
        inner, values, _ = torch.linalg.svd(basis.T @ centred, full_matrices=False)
        left = basis @ inner
    return (left.abs() * (values > 1e-5 * values[0])).float()  # where nothing varies, components are anything


@lru_cache(maxsize=4)
def _start(width: int, components: int, device: torch.device) -> Tensor:
    """Where a subspace iteration starts; drawn on the host, which takes longer than the iteration's products do on a GPU."""
    with torch.inference_mode(False):
        return torch.randn(width, components, generator=torch.Generator().manual_seed(0)).to(device)


def _passed(alike: Tensor, score: Tensor) -> Tensor:
    """Which of N tokens are not suppressed: by score, equal ones by number, each that is like none which passed before it.

    A token is settled as soon as all that are like it and come before it are; all tokens are looked at in each round, of which one more changes nothing.
    """
    place = torch.empty_like(score, dtype=torch.int64)
    place[torch.argsort(score, descending=True, stable=True)] = torch.arange(len(score), device=score.device)
    before = alike & (place[None] < place[:, None])  # [N, N]: of each row those that may suppress it
    passed = torch.zeros_like(score, dtype=torch.bool)
    gone = torch.zeros_like(passed)
    while not bool((passed | gone).all()):
        for _ in range(ROUNDS):
            passed |= ~gone & ~(before & ~gone).any(1)
            gone |= (before & passed).any(1)
    return passed


def shared(counts: Sequence[int], passed: Sequence[int], keep: int) -> list[int]:
    """How many tokens of each group stay, `keep` in all, which groups that are not empty must not outnumber.

    One of each, the rest by how many passed, rounded in sums; no more than passed, nor than 5 ceil(K / 64), as long as other groups have some
    left. What is so left over goes to the groups of which most passed.
    """
    lower = [min(1, n) for n in counts]
    upper = [min(5 * -(-keep // 64), n, p) for n, p in zip(counts, passed, strict=True)]
    while sum(upper) < keep:
        upper = [min(u + 1, n) for u, n in zip(upper, counts, strict=True)]
    rest = keep - sum(lower)
    sums = [round(Fraction(rest * p, sum(passed))) for p in accumulate(passed)]
    shares = [min(low + after - before, u) for low, before, after, u in zip(lower, [0, *sums], sums, upper)]
    for group in sorted(range(len(counts)), key=lambda g: -passed[g]):
        shares[group] += min(upper[group] - shares[group], keep - sum(shares))
    return shares
