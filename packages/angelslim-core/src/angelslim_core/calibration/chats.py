"""Prompts and conversations of JSONL files, whatever shape their author chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .rows import Chat, interpret, read_objects

_IDS = ("id", "question_id")


@dataclass(frozen=True)
class Conversation:
    """Messages `{role, content}` of a row.

    Args:
        id: unique within the file.
        messages: an assistant's may have `token_ids`, where its text would be tokenized to others.
        finished: the last answer ends with its end of turn; false where it was cut at a limit.
    """

    id: str
    messages: Chat
    finished: bool = True


def read_prompts(path: Path) -> list[Conversation]:
    """What users say in each row: `prompt`, each of `turns`, or the user turns of `conversations` or `messages`; a system turn is kept.

    Raises:
        RecipeError: a malformed row, one in which no user speaks, an id that occurs twice, or no row at all.
    """
    found = []
    for number, row in read_objects(path):
        messages = [m for m in _messages(row, path, number) if m["role"] in ("system", "user")]
        if not messages or messages[-1]["role"] == "system" or any(m["role"] == "system" for m in messages[1:]):
            raise RecipeError(725, f"{path}:{number}", "holds no user turn, or a system turn that is not the first")
        found.append(Conversation(_id(row, number), [{"role": m["role"], "content": m["content"]} for m in messages]))
    return _checked(found, path)


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations with answers, each cut where user and assistant no longer take turns; rows without an answer are left out.

    Raises:
        RecipeError: a malformed row, an id that occurs twice, or no assistant turn in the whole file.
    """
    found, rows = [], 0
    for number, row in read_objects(path):
        rows += 1
        whole = _messages(row, path, number)
        messages = _alternating(whole)
        if messages:
            found.append(Conversation(_id(row, number), messages, row.get("finished") is not False or len(messages) < len(whole)))
    if rows and not found:
        raise RecipeError(726, str(path), f"none of its {rows} rows holds an assistant turn after a user turn", "regenerate answers: angelslim specdec regen")
    return _checked(found, path)


def _messages(row: Mapping[str, Any], path: Path, number: int) -> Chat:
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return [{"role": "user", "content": turn} for turn in turns]
    found = interpret(row)
    if not isinstance(found, list):
        keys = ", ".join(map(repr, row))[:200] or "none"
        hint = "in text nothing is an answer: a step of distillation reads it with count: all" if "text" in row else ""
        raise RecipeError(727, f"{path}:{number}", f"holds no prompt, turns, conversations or messages; its keys: {keys}", hint)
    return found


def _alternating(messages: Sequence[dict[str, Any]]) -> Chat:
    """An optional system turn, then user and assistant by turns, up to the last answer."""
    start = 1 if messages and messages[0]["role"] == "system" else 0
    end = start
    while end < len(messages) and messages[end]["role"] == ("user", "assistant")[(end - start) % 2]:
        end += 1
    end -= (end - start) % 2
    return list(messages[:end]) if end > start else []


def _id(row: Mapping[str, Any], number: int) -> str:
    return next((str(row[name]) for name in _IDS if isinstance(row.get(name), str | int)), str(number))


def _checked(found: list[Conversation], path: Path) -> list[Conversation]:
    if not found:
        raise RecipeError(728, str(path), "is empty")
    seen: set[str] = set()
    for each in found:
        if each.id in seen:
            raise RecipeError(729, str(path), f"id {each.id!r:.100} occurs twice")
        seen.add(each.id)
    return found
