"""Conversations in which the target itself answers what users said: a draft learns from nothing else as well.

The output is a JSONL file to which finished conversations are appended, in the order in which they finish; a run that was stopped
goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from angelslim_core.calibration.chats import Conversation
from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import EngineError, StoppedError, UsageError

from .answers import Answer, Assistant, Request
from .appended import AppendedRows

log = logging.getLogger(__name__)

_AT_ONCE = 4096  # conversations whose later turns wait for each other
_FEW = 16  # refused answers that no server is blamed for


@dataclass(frozen=True)
class Mix:
    """Temperatures and how often each is drawn."""

    temperatures: tuple[float, ...] = (0.0,)
    weights: tuple[float, ...] = (1.0,)

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Of `0.7`, or of `0:4,0.3:1,1:3`: temperatures and weights.

        Raises:
            UsageError: no such numbers.
        """
        try:
            pairs = [(float(t), float(w or 1)) for t, _, w in (part.partition(":") for part in text.split(","))]
        except ValueError:
            pairs = []
        if not pairs or any(not 0 <= t <= 10 or not 0 < w < 1e6 for t, w in pairs):
            raise UsageError(738, "--temperature", f"{text!r:.100} is no temperature and no list of TEMPERATURE:WEIGHT", "as in 0.7 or 0:4,0.7:1,1:3")
        return cls(tuple(t for t, _ in pairs), tuple(w for _, w in pairs))

    def draw(self, seed: int) -> float:
        return random.Random(seed).choices(self.temperatures, self.weights)[0]


@dataclass
class Counts:
    """What became of the prompts.

    Args:
        resumed: conversations that an earlier run had written.
        cut: whose last answer was cut at the limit, kept or not.
        empty: dropped, since the assistant said nothing.
        refused: dropped, since the server took no such conversation; the next run asks again.
    """

    prompts: int = 0
    written: int = 0
    resumed: int = 0
    cut: int = 0
    empty: int = 0
    refused: int = 0
    tokens: int = 0
    seconds: float = 0.0


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).digest()[:6], "little")


def regenerate(
    prompts: Sequence[Conversation], assistant: Assistant, out: Path, settings: Mapping[str, Any], *, mix: Mix, samples: int = 1, seed: int = 0,
    keep_cut: bool = True, differs: Callable[[list[int], str], bool] = lambda ids, text: False, replace: bool = False,
    progress: Progress = silent, stop_requested: Callable[[], bool] = never,
) -> Counts:  # fmt: skip
    """Answer every user turn in order, on the regenerated history.

    Args:
        settings: what the answers depend on beside prompts and the arguments here; an unfinished output of other settings is refused.
        mix: temperature of each conversation.
        samples: conversations for each prompt.
        keep_cut: keep an answer that was cut at the limit, as the last of its conversation and with `finished` false.
        differs: whether an answer's text would be tokenized to other tokens, which are then kept as well.

    Raises:
        OutputError: the output exists and is of other settings.
        EngineError: the server refuses more than half of what it is asked.
        StoppedError: the run was asked to stop.
    """
    if samples > 1 and not any(mix.temperatures):
        raise UsageError(739, "--samples", "at temperature 0 all answers to a prompt are the same", "give --temperature, or one sample")
    counts = Counts(prompts=len(prompts) * samples)
    asked = [
        _Talk(c.id if samples == 1 else f"{c.id}#{n}", c.messages, mix.draw(seed_of(seed, c.id, n, "temperature"))) for c in prompts for n in range(samples)
    ]
    known = {**settings, "temperatures": list(mix.temperatures), "weights": list(mix.weights), "samples": samples, "seed": seed, "keep_cut": keep_cut}
    with AppendedRows(out, known, replace) as rows:
        waiting = [talk for talk in asked if talk.id not in rows.ids]
        counts.resumed = len(asked) - len(waiting)
        start, done, heard = time.perf_counter(), 0, 0
        for first in range(0, len(waiting), _AT_ONCE):
            talks = waiting[first : first + _AT_ONCE]
            while talks:
                requests = [Request(t.said, t.temperature, seed_of(seed, t.id, len(t.said))) for t in talks]
                going = []
                for number, answer in assistant(requests):
                    talk = talks[number]
                    counts.tokens += answer.tokens
                    heard += 1
                    counts.refused += bool(answer.refused)
                    if counts.refused > max(_FEW, heard / 2) or counts.refused == heard == len(waiting):
                        what = f"the server refused {counts.refused} of {heard} requests, the last with {answer.refused}"
                        raise EngineError(792, str(out), what, "see whether --max-new-tokens leaves room for prompts")
                    if talk.hear(answer, differs):
                        going.append(talk)
                    else:
                        _write(talk, rows, counts, keep_cut)
                        done += 1
                    rate = counts.tokens / (time.perf_counter() - start)
                    progress(done, len(waiting), f"{rate:.0f} tok/s, {counts.cut} cut, {counts.empty} empty, {counts.refused} refused")
                    if stop_requested():
                        raise StoppedError(
                            2, str(out), f"stopped as asked with {len(rows.ids)} of {len(asked)} conversations", "run the same command again to go on"
                        )
                talks = going
        counts.seconds = time.perf_counter() - start
    return counts


@dataclass
class _Talk:
    """A conversation that is being regenerated."""

    id: str
    given: Sequence[dict[str, Any]]
    temperature: float
    said: list[dict[str, Any]] = field(default_factory=list)
    last: Answer | None = None
    prompt_tokens: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self._ask()

    def _ask(self) -> None:
        """The user speaks, after a system turn where there is one."""
        at = sum(m["role"] != "assistant" for m in self.said)
        stop = next(i for i in range(at, len(self.given)) if self.given[i]["role"] == "user") + 1
        self.said += self.given[at:stop]

    def hear(self, answer: Answer, differs: Callable[[list[int], str], bool]) -> bool:
        """Take an answer; whether the user goes on."""
        self.last, self.prompt_tokens, self.tokens = answer, self.prompt_tokens + answer.prompt_tokens, self.tokens + answer.tokens
        turn: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.ids is not None and differs(answer.ids, answer.text):
            turn["token_ids"] = answer.ids
        self.said.append(turn)
        more = sum(m["role"] != "assistant" for m in self.said) < len(self.given)
        if more and answer.finished and answer.text.strip():
            self._ask()
            return True
        return False


def _write(talk: _Talk, rows: AppendedRows, counts: Counts, keep_cut: bool) -> None:
    assert talk.last is not None
    said, finished = talk.said, talk.last.finished
    counts.cut += not finished
    if not talk.last.text.strip():
        counts.empty += not talk.last.refused
        said, finished = said[:-2], True  # what was said before it is good
    elif not finished and not keep_cut:
        said, finished = said[:-2], True
    usable = any(m["role"] == "assistant" for m in said)
    if talk.last.refused:
        log.warning("%s: the server refused it: %s", talk.id, talk.last.refused)
        if not usable:
            return
    counts.written += usable
    row = {"id": talk.id, "conversations": said if usable else [], "finished": finished, "temperature": talk.temperature}
    rows.append({**row, "prompt_tokens": talk.prompt_tokens, "completion_tokens": talk.tokens})
