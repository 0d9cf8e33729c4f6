"""Strategies as a command line names them: `idpruner:lam=.7,divprune`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from angelslim_core.errors import RecipeError, UsageError
from angelslim_core.strict_yaml import parse

from .strategies import CLASSES, make_strategy, strategy_class
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


def candidates(text: str, keep_ratio: float) -> list[Candidate]:
    """Strategies of a list such as `divprune:keep_ratio=.1,random`.

    Args:
        keep_ratio: of those that name no budget.

    Raises:
        UsageError: no such strategy or option, a value that does not fit, or one twice.
    """
    found = [_candidate(label, keep_ratio) for label in re.split(r",(?=[a-z_]+(?:[:,]|$))", text.strip())]
    twice = [c.label for i, c in enumerate(found) if c in found[:i]]
    if twice:
        raise UsageError(894, "--strategies", f"names {twice[0]} twice")
    return found


def every(keep_ratio: float, scorer: Path) -> list[Candidate]:
    """Every strategy there is, with default options but for the budget and the folder of a scorer."""
    found = []
    for name in CLASSES:
        given = {"scorer": scorer} if "scorer" in strategy_class(name).model_fields else {}
        found.append(Candidate(name, name, given, make_strategy(name, keep_ratio=keep_ratio, **given)))
    return found


def _candidate(label: str, keep_ratio: float) -> Candidate:
    name, *pairs = label.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key in options:
            raise UsageError(856, "--strategies", f"{label!r:.100} gives {key!r:.40} twice")
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
