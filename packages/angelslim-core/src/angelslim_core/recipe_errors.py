"""Mistakes in a recipe: where they lie, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .errors import RecipeError


def dotted(parts: Iterable[str | int]) -> str:
    """A path as it is written: "steps[0].with.bits"."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def where_of(name: str, parts: tuple[str | int, ...], positions: Mapping[Any, tuple[int, int]], overridden: Mapping[str, str]) -> str:
    """Where a part of a recipe stands: file, line and column, or the option that set it."""
    path = dotted(parts)
    inside = next((place for changed, place in overridden.items() if path and changed.startswith(f"{path}.")), None)
    if inside and parts not in positions:
        return inside
    for end in range(len(parts), 0, -1):
        if dotted(parts[:end]) in overridden:
            return overridden[dotted(parts[:end])]
        if parts[:end] in positions:
            line, column = positions[parts[:end]]
            return f"{name}:{line}:{column} {path}"
    return f"{name} {path}".strip() if name != "recipe" else path or name


def first_problem(
    error: ValidationError, name: str, prefix: tuple[str | int, ...], positions: Mapping[Any, tuple[int, int]], overridden: Mapping[str, str], model: type[BaseModel],
    extra: Sequence[str] = (),
) -> RecipeError:  # fmt: skip
    """The first problem pydantic found, in our words; the hint counts the others.

    Args:
        extra: keys allowed at the top that the model does not have.
    """
    # a misspelt key explains the missing one, not the other way round
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    path = (*prefix, *problem["loc"])
    where = where_of(name, path, positions, overridden)
    more = f"; {len(problems) - 1} more after this one" if len(problems) > 1 else ""
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = _keys(model, problem["loc"][:-1], extra)
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known) or 'none'}"
        return RecipeError(21, where, f"unknown key {key!r}", hint + more)
    if problem["type"] == "missing":
        return RecipeError(22, where_of(name, path[:-1], positions, overridden), f"lacks {problem['loc'][-1]!r}", more.removeprefix("; "))
    message = problem["msg"].removeprefix("Value error, ")
    return RecipeError(23, where, f"{message[0].lower()}{message[1:]} (it is {value!r:.80})", more.removeprefix("; "))


def _keys(model: type[BaseModel], loc: Sequence[str | int], extra: Sequence[str]) -> list[str]:
    """Keys a model allows at a location, `extra` ones on top."""
    current: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        fields = {f.alias or n: f for n, f in current.model_fields.items()}
        if part not in fields:
            return []
        current = _model_in(fields[part].annotation)
        if current is None:
            return []
    keys = [f.alias or n for n, f in current.model_fields.items()]
    return [*keys, *extra] if current is model else keys


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := _model_in(a)) is not None), None)
