"""How many tokens a round proposes, and how many of them it verifies: what gives the most tokens in the time that it takes.

Both are set before a round begins, from what earlier rounds took and had accepted, so that the host need not wait for a proposal and
rounds stay graphs of fixed shapes. Which tokens are verified, of so many, the round itself says (`dcut`).

Shapes: L rows that took part in a round, K proposed tokens a row.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SHARES = (0.25, 0.5, 0.75)
# what counts for as much, before anything was seen, as so many tokens that were
_TRUST = 0.25


class Round(NamedTuple):
    """What a round does.

    Args:
        k: tokens proposed a row.
        size: proposed tokens of all rows that are verified; None: all.
    """

    k: int
    size: int | None = None


class Pacing(Protocol):
    """Says what a round does, from what earlier ones did."""

    def next(self) -> Round:
        """The coming round, of no more tokens than the engine's k."""

    def saw(self, done: Round, seconds: float, accepted: Tensor, verified: Tensor, scores: Tensor) -> None:
        """A round that is over.

        Args:
            accepted, verified: [L], int64: proposed tokens.
            scores: [L, K], fp32, of all proposed tokens, as `dcut.scores` gives them; on the host.
        """


class Pace:
    """Chooses among a few kinds of round: none proposed, 1, 2, 4 ... and all of K, and of all K the likeliest quarter, half and three quarters.

    What a round of each kind takes is measured as decoding goes, each being run some times at first. What it would give is estimated from
    the draft's own scores, corrected at each position by how many tokens were accepted for what was expected.

    Args:
        k: K.
        rows: of the batch.
        cuts: the proposals are chains, whose tokens can be left out.
        ms: of each of `rounds`, if known; then none is measured.
        memory: rounds after which what was seen counts for 1/e.
        every: rounds after which something else than the best is tried; twice as many after each try in vain.

    Attributes:
        rounds: the kinds, those without cuts first.
    """

    FRESH = 3  # rounds of a kind that are not timed: kernels are compiled, a graph is captured
    TIMED = 3
    LONGEST = 16

    def __init__(self, k: int, rows: int, *, cuts: bool = True, ms: Sequence[float] | None = None, memory: float = 32.0, every: int = 24) -> None:
        lengths = sorted({0, k, *(2**i for i in range(k.bit_length()) if 2**i < k)})
        sizes = sorted({size for share in SHARES if rows > 1 and (size := math.ceil(share * rows * k)) < rows * k}) if cuts else []
        self.rounds = [*(Round(n) for n in lengths), *(Round(k, size) for size in sizes)]
        self._k, self._rows, self._memory, self._every = k, rows, memory, every
        self._known = None if ms is None else dict(zip(self.rounds, ms, strict=True))
        self._times: dict[Round, deque[float]] = {kind: deque(maxlen=5) for kind in self.rounds}
        self._done = dict.fromkeys(self.rounds, 0)
        self._now, self._wait, self._next_try, self._tries = 0, every, every, 0
        self._was_best: Round | None = None
        # of each position: rows that had a token there proposed, the sum of its scores, of those verified, and how many were accepted
        self._seen = torch.zeros(4, k, dtype=torch.float64)
        self._when = torch.zeros(k, dtype=torch.float64)
        # sums of scores by position: of all of K, and of what each size would keep of them
        self._shares = torch.zeros(1 + len(sizes), k, dtype=torch.float64)

    def next(self) -> Round:
        """As `Pacing`."""
        if self._known is None:
            for kind in reversed(self.rounds):
                if self._done[kind] < self.FRESH + self.TIMED:
                    return kind
        value = self.values()
        best = max(self.rounds, key=value.__getitem__)
        if best != self._was_best:
            self._was_best, self._wait, self._next_try = best, self._every, self._now + self._every
        elif self._now >= self._next_try:
            self._wait = min(2 * self._wait, self.LONGEST * self._every)
            self._next_try, self._tries = self._now + self._wait, self._tries + 1
            # by turns the one that seems next best, and the one that takes a little longer
            others = [kind for kind in self.rounds if kind != best]
            longer = [kind for kind in others if self._ms(kind) > self._ms(best)]
            if longer and self._tries % 2:
                return min(longer, key=self._ms)
            return max(others, key=value.__getitem__)
        return best

    def _ms(self, kind: Round) -> float:
        return median(self._times[kind]) if self._known is None else self._known[kind]

    def values(self) -> dict[Round, float]:
        """Tokens a row for each unit of time, by what is known."""
        return {kind: self.expected(kind) / self._ms(kind) for kind in self.rounds}

    def expected(self, kind: Round) -> float:
        """Tokens a row that a round of this kind gives, the one that the target adds counted."""
        reached = self.reached()[: kind.k]
        if kind.size is None:
            return 1 + sum(reached)
        at = [n.size for n in self.rounds if n.size is not None].index(kind.size)
        whole, part = self._shares[0].tolist(), self._shares[1 + at].tolist()
        if not whole[0]:  # no round of all of K was seen: at least what the first columns give
            return 1 + sum(reached[: kind.size // self._rows])
        return 1 + sum(r * p / w for r, p, w in zip(reached, part, whole, strict=True) if w)

    def reached(self) -> list[float]:
        """Share of rows whose token at each position would be accepted, were all verified; where nothing was seen, as from the position before."""
        found: list[float] = []
        before, kept_on, factor = 1.0, 1.0, 1.0
        for rows, total, asked, hits in self._seen.T.tolist():
            factor = (hits + _TRUST * factor) / (asked + _TRUST)
            reach = min(before, (factor * total + _TRUST * before * kept_on) / (rows + _TRUST))
            before, kept_on = reach, reach / before if before else 0.0
            found.append(reach)
        return found

    def saw(self, done: Round, seconds: float, accepted: Tensor, verified: Tensor, scores: Tensor) -> None:
        """As `Pacing`."""
        self._now += 1
        self._done[done] += 1
        if self._done[done] > self.FRESH:
            self._times[done].append(1e3 * seconds)
        if not done.k or not len(accepted):
            return
        of = scores[:, : done.k].double()
        number = torch.arange(done.k)
        asked, hits = (of * (number < verified[:, None])).sum(0), (number < accepted[:, None]).sum(0)
        # what was not looked at for long counts little once it is, and until then as it was
        fade = ((self._when[: done.k] - self._now) / self._memory).exp()
        seen = self._seen[:, : done.k]
        seen.mul_(fade).add_(torch.stack([torch.full_like(asked, len(of)), of.sum(0), asked, hits]))
        self._when[: done.k] = self._now
        if done.k == self._k and len(self._shares) > 1:
            ranked, order = of.T.flatten().sort(descending=True, stable=True)
            position = order // len(of)
            sums = [of.sum(0), *(torch.zeros_like(asked).index_add_(0, position[:n], ranked[:n]) for n in (r.size for r in self.rounds) if n is not None)]
            self._shares.mul_(fade[-1]).add_(torch.stack(sums))
