"""Prompts that a target makes up itself: given the opening of a user's turn it goes on as the users of its training did.

Source: Magpie, arXiv:2406.08464.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from angelslim_core.calibration.rows import read_objects
from angelslim_core.calibration.spans import STAND_IN
from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import ModelError, StoppedError

from .appended import AppendedRows

if TYPE_CHECKING:
    from angelslim_core.calibration.spans import Renderer

# of prompts in a row that are of no use, before it is given up
_MOST_USELESS = 2000

Tokens = Callable[[list[int], int], Iterator[tuple[int, list[int]]]]
"""tokens(opening, first) -> number of an attempt, from `first` on and without end, and what follows the opening, a stop token included."""


@dataclass
class Invented:
    """What became of the attempts.

    Args:
        resumed: rows that an earlier run had written.
        cut: attempts that did not end; `repeated`: said before; `empty`: of nothing but space.
        tokens: of all attempts.
    """

    written: int = 0
    resumed: int = 0
    cut: int = 0
    repeated: int = 0
    empty: int = 0
    tokens: int = 0
    seconds: float = 0.0


def opening(renderer: Renderer) -> list[int]:
    """Tokens of the template up to where a user's first words stand, a default system turn among them.

    Raises:
        ModelError: the template does not show what a user says.
    """
    text = renderer.render([[{"role": "user", "content": STAND_IN}]])[0]
    before, shown, _ = text.partition(STAND_IN)
    found = renderer.encode(before)
    if not shown or not found:
        raise ModelError(768, "chat template", "opens no user's turn that the target could go on with")
    return found


Use = Callable[[Invented, int, list[int]], str]
"""use(found, number, ids) -> what of an attempt is kept; nothing where it is of no use, which is then counted."""


def invent(
    renderer: Renderer, tokens: Tokens, stop_ids: tuple[int, ...], count: int, out: Path, settings: Mapping[str, Any], *, replace: bool = False,
    progress: Progress = silent, stop_requested: Callable[[], bool] = never,
) -> Invented:  # fmt: skip
    """Write prompts as rows `{id, prompt}`, each once, until there are `count` of them.

    Args:
        settings: what prompts depend on beside the template; an unfinished output of other settings is refused.

    Raises:
        OutputError: the output exists and is of other settings.
        ModelError: the target makes up nothing that could be used.
        StoppedError: it was asked to stop.
    """
    start, stops = opening(renderer), frozenset(stop_ids)

    def use(found: Invented, number: int, ids: list[int]) -> str:
        ended = bool(ids) and ids[-1] in stops
        text = renderer.tokenizer.decode(ids[:-1], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        found.cut += not ended
        found.empty += ended and not text
        return text if ended else ""

    hint = "a greater --max-new-tokens or --temperature may help; not every model has learned what users say"
    return collect(
        lambda first: tokens(start, first), use, "prompt", count, out, settings, hint, replace=replace, progress=progress, stop_requested=stop_requested
    )


def collect(
    attempts: Callable[[int], Iterator[tuple[int, list[int]]]], use: Use, field: str, count: int, out: Path, settings: Mapping[str, Any], hint: str, *,
    replace: bool = False, progress: Progress = silent, stop_requested: Callable[[], bool] = never,
) -> Invented:  # fmt: skip
    """Write what is of use as rows `{id, field}`, each once, until there are `count` of them.

    Args:
        attempts: attempts(first) -> number of an attempt, from `first` on and without end, and its tokens.
        hint: what to do where nothing is of use.

    Raises:
        OutputError: the output exists and is of other settings.
        ModelError: too many attempts in a row are of no use.
        StoppedError: it was asked to stop.
    """
    found = Invented()
    with AppendedRows(out, settings, replace) as rows:
        known = {str(row.get(field)) for _, row in read_objects(out)} if rows.ids else set()
        found.resumed = len(rows.ids)
        began, useless, missing = time.perf_counter(), 0, count - len(rows.ids)
        first = 1 + max((int(name) for name in rows.ids), default=-1)
        for number, ids in attempts(first) if missing > 0 else ():
            found.tokens += len(ids)
            text = use(found, number, ids)
            useless += 1
            if text in known:
                found.repeated += 1
            elif text:
                useless = 0
                known.add(text)
                rows.append({"id": str(number), field: text})
                found.written += 1
            if useless > _MOST_USELESS:
                what = f"{useless} attempts in a row were cut, empty or said before ({found.cut}, {found.empty} and {found.repeated} in all)"
                raise ModelError(769, str(out), what, hint)
            progress(found.written, missing, f"{found.cut} cut, {found.repeated} repeated, {found.empty} empty")
            if found.written == missing:
                break
            if stop_requested():
                raise StoppedError(6, str(out), f"stopped as asked with {len(rows.ids)} of {count} {field}s", "run the same command again to go on")
        found.seconds = time.perf_counter() - began
    return found
