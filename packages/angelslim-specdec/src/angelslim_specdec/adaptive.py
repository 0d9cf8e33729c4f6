"""How many proposed tokens a round verifies, when many rows share it: as many as pay for their time.

Two choices, each of which a batch may use: `Pace` sets the tokens drafted for a round from what was accepted in the rounds before,
which is lossless under every rule; D-Cut (`lengths`) cuts a drafted round by the draft's confidence, which under the ratio rule is not
lossless for drawn tokens: that a token is cut says something about it, and then the target's p is drawn from where max(p - q, 0) would be.

Shapes: B rows, K proposed tokens a row, S shares.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .drafters.base import Proposal

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class CostTable:
    """Time of a round by what it verifies, one batch size.

    Args:
        ms: where `packed`, [S], of a round that verifies each of `SHARES` of all proposed tokens, whoever's they are; else [K + 1], of one
            that verifies 0, 1 ... K tokens of every row.
        packed: whether rows of different length cost what their tokens do, not what the longest does.
    """

    ms: Tensor
    packed: bool = False


def measure(round_of: Callable[[int], object], counts: Sequence[int], device: str, *, packed: bool = False, repeats: int = 5) -> CostTable:
    """Time rounds that verify each of these numbers of tokens; the first call of each is a warm-up.

    Args:
        round_of: runs one round of so many tokens a row, or in all where `packed`.
    """
    found = []
    for count in counts:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            round_of(count)
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        found.append(median(times[1:]))
    return CostTable(torch.tensor(found, device=device), packed)


def lengths(confidence: Tensor, costs: CostTable) -> Tensor:
    """How many tokens of each row to verify: those that give the most expected tokens per unit of time.

    A token counts with the probability that it and all before it are accepted, the draft's own word for it. The last confirmed token is
    always verified, and the token that follows what is accepted is counted for every row.

    Args:
        confidence: [B, K], fp32, the draft's probability of each token; 0 where there is none.

    Returns:
        [B], int64; without host sync.

    Source: D-Cut, its count taken over proposed tokens only.
    """
    rows, size = confidence.shape
    expected = confidence.cumprod(1)
    if not costs.packed:  # all rows cost what the longest does
        gain = rows + torch.nn.functional.pad(expected.sum(0).cumsum(0), (1, 0))
        return (gain / costs.ms).argmax().expand(rows)
    # by columns, so that of equal ones the earlier in a row comes first: what is kept is a prefix
    order = expected.T.flatten().argsort(descending=True, stable=True)
    gain = rows + torch.nn.functional.pad(expected.T.flatten()[order].cumsum(0), (1, 0))
    sizes = torch.tensor([math.ceil(share * rows * size) for share in SHARES], device=confidence.device)
    kept = sizes[(gain[sizes] / costs.ms).argmax()]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(rows * size, device=confidence.device))
    return (rank < kept).view(size, rows).sum(0)


def check_lossless(proposal: Proposal, rule: str) -> None:
    """
    Raises:
        UsageError: tokens were drawn, and the rule is not `match`; or there is no confidence to cut by.
    """
    if proposal.confidence is None:
        raise UsageError(760, "adaptive", "this drafter states no confidence, by which to cut its proposals")
    if proposal.q is not None and rule != "match":
        raise UsageError(
            761, "adaptive", f"drawn tokens cut by confidence are not verified losslessly by the {rule} rule", "use the match rule, or draft greedily"
        )


def cut(proposal: Proposal, costs: CostTable, rule: str) -> Tensor:
    """`lengths` of a proposal, never more than it has; [B].

    Raises:
        UsageError: as `check_lossless`.
    """
    check_lossless(proposal, rule)
    assert proposal.confidence is not None
    confidence = proposal.confidence
    if proposal.counts is not None:
        confidence = confidence * (torch.arange(confidence.shape[1], device=confidence.device) < proposal.counts[:, None])
    found = lengths(confidence, costs)
    return found if proposal.counts is None else torch.minimum(found, proposal.counts)


class Pace:
    """How many tokens to draft next, from what was accepted before: a number that depends on no token still to be verified.

    Args:
        ms: of a whole round, drafting included, that proposes 0, 1 ... K tokens.
        memory: rounds after which what was seen counts for 1/e.
        every: rounds after which one more than pays is drafted, to see whether it would by now.
    """

    def __init__(self, ms: Sequence[float], *, memory: float = 32.0, every: int = 24) -> None:
        self.ms, self.fade, self.every = list(ms), math.exp(-1 / memory), every
        self.asked = [0.0] * (len(self.ms) - 1)
        self.hits = [0.0] * (len(self.ms) - 1)
        self.rounds = 0

    def rates(self) -> list[float]:
        """The share of tokens accepted at each position, all before them being so; where nothing was seen, that of the position before."""
        found, last = [], 1.0
        for hits, asked in zip(self.hits, self.asked, strict=True):
            last = hits / asked if asked > 1e-3 else last
            found.append(last)
        return found

    def best(self) -> int:
        """What gives the most tokens per unit of time, by what is known."""
        gains, reached = [1.0], 1.0
        for rate in self.rates():
            reached *= rate
            gains.append(gains[-1] + reached)
        return max(range(len(gains)), key=lambda k: gains[k] / self.ms[k])

    def next(self) -> int:
        """Tokens to draft for the coming round."""
        best = self.best()
        if self.rounds % self.every == self.every - 1:
            return min(best + 1, len(self.ms) - 1)
        return best

    def saw(self, accepted: Sequence[int], drafted: Sequence[int]) -> None:
        """A round's rows: how many tokens each had, and how many were accepted."""
        self.rounds += 1
        for at in range(len(self.hits)):
            self.asked[at] = self.fade * self.asked[at] + sum(a >= at and d > at for a, d in zip(accepted, drafted, strict=True))
            self.hits[at] = self.fade * self.hits[at] + sum(a > at for a in accepted)
