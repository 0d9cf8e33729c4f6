"""JSON from a model folder: bounded in size and depth, duplicate keys refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ModelError

MAX_BYTES = 10 << 20
MAX_DEPTH = 64


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: missing, too large, not UTF-8, not JSON, nested too deep, duplicate keys, or no object.
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
        value = json.loads(data.decode("utf-8"), object_pairs_hook=lambda pairs: _no_duplicates(pairs, where))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(3, where, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(4, where, "holds no JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ModelError(5, where, f"key {twice!r} occurs twice")
    return found


_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


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
