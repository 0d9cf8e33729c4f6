"""Strategies as a command line names them: `idpruner:lam=.7,divprune`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from angelslim_core.errors import RecipeError, UsageError
from angelslim_core.strict_yaml import parse

from .strategies import CLASSES, make_strategy
from .strategies.base import Strategy


@dataclass(frozen=True)
class Candidate:
    """A strategy and how it was written.

    Args:
        label: as given.
        options: of `make_strategy`.
    """

    label: str
    name: str
    options: Mapping[str, Any]
    strategy: Strategy = field(compare=False)


def candidates(text: str | None, keep_ratio: float) -> tuple[list[Candidate], list[str]]:
    """Strategies of a list such as `divprune:keep_ratio=.1,random`; of None all that need no option, and why the others are left out.

    Args:
        keep_ratio: of those that name no budget.

    Raises:
        UsageError: no such strategy or option, a value that does not fit, or one twice.
    """
    if text is None:
        found, without = [], []
        for name in CLASSES:
            try:
                found.append(_candidate(name, keep_ratio))
            except UsageError as error:
                without.append(f"{error.where}: {error.what}")
        return found, without
    found = [_candidate(label, keep_ratio) for label in re.split(r",(?=[a-z_]+(?:[:,]|$))", text.strip())]
    twice = [c.label for i, c in enumerate(found) if c in found[:i]]
    if twice:
        raise UsageError(894, "--strategies", f"names {twice[0]} twice")
    return found, []


def _candidate(label: str, keep_ratio: float) -> Candidate:
    name, *pairs = label.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            options[key] = parse(value, label)[0] if equals else None
        except RecipeError as error:
            raise UsageError(895, "--strategies", f"{pair!r:.100} has no value: {error.what}", "write divprune:keep_ratio=.1") from error
        if not equals:
            raise UsageError(896, "--strategies", f"{pair!r:.100} is no option", "write divprune:keep_ratio=.1")
    if not {"keep_ratio", "keep_tokens"} & options.keys():
        options["keep_ratio"] = keep_ratio
    return Candidate(label, name, options, make_strategy(name, **options))


def numbers(text: str, where: str) -> list[int]:
    """Numbers above 0 of a list such as `576,4096`.

    Raises:
        UsageError: something else.
    """
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", text):
        raise UsageError(897, where, f"{text!r:.100} is no list of numbers such as 576,4096")
    return [int(n) for n in text.split(",")]
