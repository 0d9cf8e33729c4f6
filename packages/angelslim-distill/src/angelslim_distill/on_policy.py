"""Batches of which some are the student's own answers: it learns where it goes itself.

Source: Agarwal et al., "On-policy distillation of language models" (2306.13649), GKD.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from angelslim_core.calibration.packing import Order, Row, row_of
from angelslim_core.calibration.spans import Document
from angelslim_core.errors import UsageError
from angelslim_core.parallel import Group

from .data.rows import Source, collate
from .rollouts import RolloutSource, is_empty
from .targets import Batch


class OnPolicy:
    """A `data.rows.Source`. A step is, with probability `lmbda`, one of the student's own answers, and else one of the data.

    Seed and step decide which, alike in all processes, and with the student's weights what it answers. Answers count up to
    their end of turn; those that are empty are left out, and a process all of whose answers are empty takes its share of the data.

    Args:
        data: what the other steps take.
        prompts: token ids.
        rollouts: answers of the student; no gradient goes through them.
        batch: answers a batch, over all processes; more than there are prompts become as many.
        accumulate: batches a step.
        multiple: rows are padded to a multiple of it.
        tell: told, a line each, when data stand in for answers.

    Raises:
        UsageError: the processes cannot share a batch evenly.
    """

    def __init__(
        self, data: Source, prompts: Sequence[Sequence[int]], rollouts: RolloutSource, stop_ids: Sequence[int], *, batch: int, lmbda: float = 0.5,
        accumulate: int = 1, seed: int = 0, group: Group | None = None, multiple: int = 1, tell: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.data, self.prompts, self.rollouts, self.stop_ids, self.lmbda = data, prompts, rollouts, stop_ids, lmbda
        self._accumulate, self._seed, self.group, self._multiple, self._tell = accumulate, seed, group or Group(), multiple, tell
        self.order = Order(len(prompts), batch, seed)
        if self.order.batch % self.group.size:
            what = f"{self.order.batch} answers a batch cannot be shared by {self.group.size} processes"
            raise UsageError(934, "batch", what, "give a multiple of their number")

    def is_own(self, step: int) -> bool:
        """Whether a step is one of the student's own answers."""
        return random.Random(f"{self._seed}/on-policy/{step}").random() < self.lmbda

    def batch(self, step: int, part: int) -> Batch:
        """This process's rows of a part of a step; the student's own ones, while its weights are the same, are the same whenever it is asked."""
        if not self.is_own(step):
            return self.data.batch(step, part)
        number = step * self._accumulate + part
        prompts = [self.prompts[i] for i in self.order.numbers(number)[self.group.rank :: self.group.size]]
        seed = random.Random(f"{self._seed}/{number}/{self.group.rank}").getrandbits(62)
        answers = zip(prompts, self.rollouts(prompts, seed), strict=True)
        rows = [_row(prompt, answer) for prompt, answer in answers if not is_empty(answer, self.stop_ids)]
        if not rows:
            self._tell(f"step {step + 1}: all of the student's answers are empty, and data stand in for them")
            return self.data.batch(step, part)
        return collate(rows, self._multiple)


def _row(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    return row_of([Document([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))])


def prompts_of(rows: Sequence[Row]) -> list[list[int]]:
    """What stands before the first token that counts, of each document of some rows; nothing of those that begin with it."""
    found = []
    for row in rows:
        for number in range(int(row.documents[-1]) + 1):
            here = row.documents == number
            ids, counts = row.ids[here].tolist(), row.loss_mask[here].tolist()
            first = counts.index(True) if True in counts else 0
            found += [ids[:first]] if first else []
    return found
