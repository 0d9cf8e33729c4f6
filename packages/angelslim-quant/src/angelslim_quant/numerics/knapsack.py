"""Multiple-choice knapsack: one choice an item, least loss within a budget, for all budgets at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# table entries a row; costs are rounded up to fit, by at most the highest total over this number an item
STATES = 1 << 16


class Knapsack:
    """The table of a multiple-choice knapsack, filled by dynamic programming over costs above each item's cheapest.

    Exact where the costs' common divisor leaves at most `STATES` entries (layers repeat, so it mostly does); else costs
    are rounded up: never over the budget, and at equal granularity for every budget, so that more never loses more.

    Args:
        costs: per item the cost of each choice.
        losses: likewise, at least 0 and finite.
    """

    def __init__(self, costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> None:
        self.costs, self.losses = costs, losses
        self.lowest, self.highest = sum(map(min, costs)), sum(map(max, costs))
        above = [[cost - min(row) for cost in row] for row in costs]
        spread = self.highest - self.lowest
        self._step = math.gcd(*(cost for row in above for cost in row)) or 1
        if spread // self._step >= STATES:
            self._step = -(-spread // STATES)
        self._above = [[-(-cost // self._step) for cost in row] for row in above]
        size = sum(map(max, self._above)) + 1
        self._best = np.zeros(size)  # [c]: least loss of the items so far at a cost of at most c steps
        self._choice = np.zeros((len(costs), size), dtype=np.int8)
        for item, (steps, values) in enumerate(zip(self._above, losses, strict=True)):
            before, self._best = self._best, np.full(size, np.inf)
            for choice in sorted(range(len(steps)), key=lambda k: steps[k]):  # the cheaper of equals
                start = steps[choice]
                loss = before[: size - start] + values[choice]
                better = loss < self._best[start:]
                self._best[start:][better] = loss[better]
                self._choice[item, start:][better] = choice

    def choose(self, budget: int) -> list[int]:
        """The choice for each item.

        Raises:
            ValueError: the budget is below the cheapest choices.
        """
        if budget < self.lowest:
            raise ValueError(f"{budget} is below {self.lowest}")
        left = self._at(budget)
        chosen = []
        for item in reversed(range(len(self.costs))):
            choice = int(self._choice[item, left])
            left -= self._above[item][choice]
            chosen.append(choice)
        return chosen[::-1]

    def loss(self, budget: int) -> float:
        """The least loss within a budget."""
        return float(self._best[self._at(budget)])

    def _at(self, budget: int) -> int:
        return min((budget - self.lowest) // self._step, len(self._best) - 1)
