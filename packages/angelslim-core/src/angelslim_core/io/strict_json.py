"""JSON from a model folder: bounded in size and depth, duplicate keys refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import ModelError

MAX_BYTES = 10 << 20
MAX_DEPTH = 64


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: missing, too large, not UTF-8, not JSON, nested too deep, duplicate keys, numbers or text that cannot
            be written again (NaN, Infinity, half a surrogate pair), or no object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ModelError(1, path.name, f"is {size} bytes, more than the {max_bytes} allowed")
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(2, str(path), f"cannot be read: {error.strerror}") from error
    return parse_object(text, path.name)


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse bytes that must hold one JSON object; see `read_json`."""
    _check_depth(data, where)
    try:
        pairs_hook = lambda pairs: _no_duplicates(pairs, where)  # noqa: E731
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs_hook, parse_float=_finite, parse_constant=_finite)
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except ModelError:
        raise
    except ValueError as error:  # also too many digits, and text that is no UTF-8
        raise ModelError(3, where, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(4, where, "holds no JSON object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ModelError(5, where, f"key {twice!r} occurs twice")
    return found


# a string without an end runs to the end of the data, or every quote in it would be tried anew
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


def _check_depth(data: bytes, where: str) -> None:
    depth = 0
    for match in _TOKENS.finditer(data):
        token = match[0]
        if token in b"{[":
            depth += 1
            if depth > MAX_DEPTH:
                raise ModelError(6, where, f"is nested deeper than {MAX_DEPTH}")
        elif token in b"}]":
            depth -= 1
