"""Many prompts through few rows: a row that ends makes room for the next prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import TypeVar

import torch
from torch import Tensor

from .drafters.base import Warp
from .engine import GOES_ON, Engine, rows_of
from .graphs import Runner
from .target import Target

Key = TypeVar("Key")
# prompts that are read at once, at most
_TOGETHER = 32


def stream(
    target: Target, requests: Iterable[tuple[Key, Sequence[int]]], batch: int, capacity: int, max_new_tokens: int, *,
    warp: Warp | None = None, stops: Sequence[int] = (), seed: int = 0, static: bool | None = None,
    runner: Runner | None = None,
) -> Iterator[tuple[Key, list[int]]]:  # fmt: skip
    """Answers to many prompts, in the order in which they end; plain decoding that keeps all rows busy.

    Freed rows wait for one another, so that prompts are read several at a time; prompts of like length, side by side, cost the least.

    Args:
        requests: (what the caller knows it by, tokens of the prompt); read as rows become free.
        batch: rows.
        capacity: tokens a row may have in all.
        stops: tokens that end an answer.
        seed: of the first request, the next one's being greater by one.
        static, runner: as for `Engine`.

    Yields:
        (as given, new tokens, a stop token among them).

    Raises:
        UsageError: a prompt is empty or does not fit.
    """
    engine = Engine(target, None, batch, capacity, warp=warp, stops=stops, static=static, runner=runner)
    waiting, seeds = iter(requests), count(seed)
    draws = engine.draws([0] * batch)
    running: dict[int, tuple[Key, list[int]]] = {}
    pending: deque[Callable[[], Tensor]] = deque()
    enough, more = max(1, batch // 8), True

    def take(rows: Sequence[int], result: Tensor) -> Iterator[tuple[Key, list[int]]]:
        for row, new, goes_on in zip(rows, rows_of(result), result[:, GOES_ON].tolist(), strict=True):
            if row in running:
                running[row][1].extend(new)
                if not goes_on:
                    yield running.pop(row)

    while more or running:
        if more and (batch - len(running) >= enough or not running):
            while pending:  # rounds begun before a row is refilled are not of its new prompt
                yield from take(range(batch), pending.popleft()())
            free = [row for row in range(batch) if row not in running][:_TOGETHER]
            taken = list(islice(waiting, len(free)))
            more = len(taken) == len(free)
            if taken:
                rows = free[: len(taken)]
                for row in rows:
                    number = next(seeds)
                    for uniforms in draws.values():
                        uniforms.restart(row, number)
                lengths = torch.tensor([len(ids) for _, ids in taken])
                prompts = torch.zeros(len(taken), max(1, int(lengths.max())), dtype=torch.int64)
                for line, (_, ids) in zip(prompts, taken, strict=True):
                    line[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
                engine.admit(rows, prompts, lengths, max_new_tokens, draws)
                running.update({row: (key, []) for row, (key, _) in zip(rows, taken, strict=True)})
                yield from take(rows, engine.results(rows))
            continue
        pending.append(engine.next_round(draws))
        if len(pending) > engine.lag:
            yield from take(range(batch), pending.popleft()())
