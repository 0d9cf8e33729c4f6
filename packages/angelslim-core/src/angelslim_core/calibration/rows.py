"""Rows of a JSONL file as conversations or text, whatever shape their author chose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError

MAX_LINE_BYTES = 10_000_000
FIELDS = ("messages", "conversations", "input", "prompt", "turns", "text")
_ROLES = {"human": "user", "gpt": "assistant"}

Chat = list[dict[str, Any]]


class RowFile:
    """A JSONL file; every row is checked once, then rows are read again where they are needed.

    Args:
        path: the file.
        field: field that holds the messages or the text; None finds it in each row.

    Raises:
        RecipeError: a line is too long, not UTF-8, not a JSON object, or of no known shape.
    """

    def __init__(self, path: Path, field: str | None) -> None:
        self.path, self.field = path, field
        # only where rows begin is kept: a file may be larger than memory
        self._rows: list[tuple[int, int]] = []
        with path.open("rb") as file:
            for number, offset, line in _lines(path, file):
                self._parse(line, number)
                self._rows.append((number, offset))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, order: Sequence[int]) -> Iterator[Chat | str]:
        """Rows by their numbers, from 0, in the order given."""
        with self.path.open("rb") as file:
            for index in order:
                number, offset = self._rows[index]
                file.seek(offset)
                yield self._parse(file.readline(MAX_LINE_BYTES + 1), number)

    def _parse(self, line: bytes, number: int) -> Chat | str:
        where = f"{self.path}:{number}"
        row = _object(line, number, where)
        found = interpret(row, self.field)
        if found is None:
            wanted = f"field {self.field!r} with messages or text" if self.field else f"known field ({', '.join(FIELDS)}; input needs output)"
            keys = ", ".join(map(repr, row))[:200] or "none"
            raise RecipeError(77, where, f"has no {wanted}; its keys: {keys}", "name the field with calibration.field")
        return found


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and object of each line that is not empty.

    Raises:
        RecipeError: no such file, or a line is too long, not UTF-8, or not a JSON object.
    """
    if not path.is_file():  # a device or a pipe may never end
        raise RecipeError(79, str(path), "is no file" if path.exists() else "does not exist", "give a JSONL file")
    with path.open("rb") as file:
        for number, _, line in _lines(path, file):
            yield number, _object(line, number, f"{path}:{number}")


def _lines(path: Path, file: Any) -> Iterator[tuple[int, int, bytes]]:
    number, offset = 0, 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise RecipeError(74, f"{path}:{number}", f"the line is longer than {MAX_LINE_BYTES} bytes", "split or shorten the row")
        if line.strip():
            yield number, offset, line
        offset += len(line)


def _object(line: bytes, number: int, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        if b"\\ud" in line.lower():  # half of a surrogate pair, legal in JSON, is no text
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise RecipeError(73, where, "is not UTF-8", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(75, where, f"is not JSON: {' '.join(str(error).split())}", "write one JSON object per line") from error
    if not isinstance(row, dict):
        raise RecipeError(76, where, "is no JSON object", "write one JSON object per line")
    return row


def interpret(row: Mapping[str, Any], field: str | None = None) -> Chat | str | None:
    """A row as messages `{role, content}` or as plain text; None if it has no known shape."""
    for name in (field,) if field else FIELDS:
        if name in row and (found := _shape(row, name)) is not None:
            return found
    return None


def plain(sample: Chat | str) -> str:
    """The text alone: contents joined by line breaks."""
    return sample if isinstance(sample, str) else "\n".join(turn["content"] for turn in sample if turn["content"])


def _shape(row: Mapping[str, Any], name: str) -> Chat | str | None:
    value = row[name]
    if name == "input":
        output = row.get("output")
        both = isinstance(value, str) and isinstance(output, str)
        return [{"role": "user", "content": value}, {"role": "assistant", "content": output}] if both else None
    if name == "prompt" and isinstance(value, str):
        answer = row.get("answer")
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else []
        return [{"role": "user", "content": value}, *said]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    if value and all(isinstance(turn, str) for turn in value):
        # questions without their answers: one user turn, since many templates insist that roles alternate
        return [{"role": "user", "content": "\n\n".join(value)}]
    turns = [_turn(turn) for turn in value]
    return None if None in turns else turns  # type: ignore[return-value]


def _turn(turn: Any) -> dict[str, Any] | None:
    if not isinstance(turn, dict):
        return None
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if not isinstance(role, str) or not isinstance(content, (str, type(None))):
        return None
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": _ROLES.get(role, role), "content": content if content is not None else ""}
