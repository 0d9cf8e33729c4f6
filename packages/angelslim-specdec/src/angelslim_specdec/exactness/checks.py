"""What decoding with a draft must come to, each as a number: 1 where tokens are the target's own, 0 where not, or a p value.

Shapes: S samples, N new tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..adaptive import Pace
from ..drafters.base import Drafter, Warp
from ..target import Target
from .drafters import Oracle, Spy
from .statistics import agreement
from .subject import NEW_TOKENS, PROMPTS, SAMPLED_PROMPT, VOCABULARY, Way, continuation

WARPS = {"temperature 1.2": Warp(1.2), "temperature 1.5, top-p 0.9": Warp(1.5, top_p=0.9)}
_ROWS, _SAMPLED_TOKENS = 512, 4
_ROUNDING = 1e-4  # between the same sums in another order


def decoded(
    target: Target, drafter: Drafter | None, prompts: Sequence[Sequence[int]], tokens: int, seed: int = 0, tell: Callable[[list[list[int]]], None] | None = None,
    **options: Any,
) -> engine.Decoded:  # fmt: skip
    """Prompts decoded in one batch by the engine, whose arguments `options` are."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt))
    made = engine.Engine(target, drafter, len(prompts), longest + tokens, **options)
    return made.decode(ids, torch.tensor([len(p) for p in prompts]), tokens, range(seed, seed + len(prompts)), tell)


class Greedy:
    """Greedy decoding against the target's own continuations, made without a cache."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.wanted: dict[tuple[int, ...], list[int]] = {p: continuation(target, p, NEW_TOKENS) for p in PROMPTS}

    def oracles(self) -> list[Way]:
        """Drafters that are always right, never, or now and then, as chains and as trees."""
        kinds = {"right": 0, "never right": 1, "wrong at every third token": 3}
        return [
            Way(f"{'tree' if tree else 'chain'} that is {name}", partial(Oracle, self.wanted, VOCABULARY, wrong, tree), tree=tree)
            for tree in (False, True)
            for name, wrong in kinds.items()
        ]

    def alike(self, way: Way, lengths: Sequence[int], prompts: Sequence[tuple[int, ...]] | None = None) -> float:
        """1 where all tokens are the target's own with each number of proposed tokens, prompts in one batch or, None, one by one; else 0."""
        groups = [[prompt] for prompt in PROMPTS] if prompts is None else [list(prompts)]
        found = [decoded(self.target, way.make(), group, NEW_TOKENS, k=k).tokens == [self.wanted[p] for p in group] for k in lengths for group in groups]
        return float(all(found))

    def stops(self, way: Way) -> float:
        """The same with a stop token that each prompt's answer has in its middle: the answer ends with it."""
        found = []
        for prompt in PROMPTS:
            answer = self.wanted[prompt]
            at = next(i for i in range(6, NEW_TOKENS) if answer[i] not in answer[:i])
            found.append(decoded(self.target, way.make(), [prompt], NEW_TOKENS, k=5, stops=[answer[at]]).tokens == [answer[: at + 1]])
        return float(all(found))

    def accepts_all(self) -> float:
        """1 where a drafter that is always right gets every token accepted, in as few rounds as there can be."""
        right = self.oracles()[0]
        found = decoded(self.target, right.make(), PROMPTS[:1], NEW_TOKENS, k=3)
        return float(found.rounds == [-(-(NEW_TOKENS - 1) // 4)] and found.acceptance_length == 4.0)

    def fresh(self, way: Way, stale: bool = False) -> float:
        """1 where a drafter that has seen round after round proposes what one proposes that is told all at once, whatever was rejected in between."""
        spy = Spy(way.make(), stale)
        decoded(self.target, spy, PROMPTS, NEW_TOKENS, k=3)
        found, last = spy.fresh(way.make(), 3), spy.proposals[-1][1]
        same = found.tokens == last.tokens
        if found.confidence is not None and last.confidence is not None:
            same &= (found.confidence - last.confidence).abs() < _ROUNDING
        if last.counts is not None:
            same |= torch.arange(same.shape[1]) >= last.counts[:, None]
        return float(same.all())


# what rounds are made to cost: of 0, 1, 2 and 3 tokens, and of a quarter, half and three quarters of three
LENGTHS, CUTS = [1.0, 1.3, 1.6, 2.2, 9.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0, 1.05, 1.1, 1.8]


def sampled(
    target: Target, way: Way, rule: engine.Rule, warp: Warp, expected: Tensor, samples: int, costs: Sequence[float] | None = None, seed: int = 1
) -> float:  # fmt: skip
    """p value of sampled text, the first tokens after a prompt, each row with a seed of its own.

    Args:
        expected: [V] * 4, as `statistics.joint` gives it.
        costs: of rounds, by which their kind is chosen from what was accepted: `LENGTHS` or `CUTS`; None: all propose the same, all of it verified.
    """
    rows = []
    for start in range(0, samples, _ROWS):
        pace = None if costs is None else Pace(3, _ROWS, ms=costs)
        rows += decoded(
            target, way.make(), [SAMPLED_PROMPT] * _ROWS, _SAMPLED_TOKENS, seed + start, k=3, warp=warp, rule=rule, pace=pace
        ).tokens  # fmt: skip
    return agreement(torch.tensor(rows), expected)
