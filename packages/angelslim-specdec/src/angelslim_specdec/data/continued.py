"""Text of a given kind that the target writes itself: shown, raw, how passages of a file begin, it goes on.

A model that is trained towards itself should be trained on text of the kind it will be used on, of which there may be little.

Source: LLM-QAT, arXiv:2305.17888, section 2.1, where the model goes on from a single random token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from angelslim_core.calibration.rows import interpret, read_objects
from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import ModelError, UsageError

from .invent import Invented, collect
from .regenerate import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = 4
"""Tokens that a prefix has at least: so many may be one character."""

_LONG = 1000  # characters of a line after which a prefix may begin at a word, too
_SPARE = 8  # tokens read behind a prefix
_KNOWN = 4096  # prefixes that are kept
_LINE, _WORD = re.compile(r"[^\n]*\S[^\n]*"), re.compile(r"(?<=\s)\S")


@dataclass(frozen=True)
class Prefix:
    """What the target goes on with.

    Args:
        text: a piece of a passage; `ids`: its tokens, behind the one that the tokenizer begins texts with where there is one.
    """

    text: str
    ids: list[int]


def read_passages(path: Path) -> list[str]:
    """The text of a file, or of each row of JSONL that has `text`.

    Raises:
        UsageError: no such file, not UTF-8, nothing but space in it, or a row without text.
        RecipeError: a line is no JSON object.
    """
    where = f"--text {path}"
    if not path.is_file():  # a device or a pipe may never end
        raise UsageError(1020, where, "is no file" if path.exists() else "does not exist")
    if path.suffix.lower() in (".jsonl", ".json"):
        texts = []
        for number, row in read_objects(path):
            text = interpret(row)
            if not isinstance(text, str):
                raise UsageError(1021, f"{where}:{number}", "holds no text", 'give rows of {"text": ...}; answers to prompts are what regen writes')
            texts.append(text)
    else:
        try:
            texts = [path.read_text(encoding="utf-8-sig")]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(1022, where, f"cannot be read as text: {error}", "save the file as UTF-8") from error
    if not any(text.strip() for text in texts):
        raise UsageError(1023, where, "is empty", "give text of the kind that is wanted")
    return texts


def starts_of(text: str) -> list[int]:
    """Where a prefix may begin: at lines that are not blank, and in long ones also at a word after each thousand characters."""
    found = []
    for line in _LINE.finditer(text):
        found.append(line.start())
        for at in range(line.start() + _LONG, line.end(), _LONG):
            word = _WORD.search(text, at, min(at + _LONG, line.end()))
            found.append(word.start() if word else at)  # not every script puts space between words
    return found


class Passages:
    """Prefixes of drawn lengths at drawn places: each place once in an order of its own, then each once again, and so on.

    Args:
        texts: passages; a prefix lies in one of them.
        least, most: tokens of a prefix, fewer by up to three where the last ones are half a character.
        where: the file, for messages.

    Raises:
        ModelError: the tokenizer does not say where its tokens lie.
        UsageError: no passage has `least` tokens.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, least: int, most: int, seed: int, where: str) -> None:
        if not tokenizer.is_fast:
            raise ModelError(1024, where, "the model has a tokenizer that does not say where in the text its tokens lie", "convert it to tokenizer.json")
        self._texts, self._tokenizer, self._least, self._most, self._seed = texts, tokenizer, least, most, seed
        bos, shown = tokenizer.bos_token_id, list(tokenizer("a", verbose=False)["input_ids"])
        self.leading: list[int] = [bos] if bos is not None and shown[:1] == [bos] else []
        self.places: list[tuple[int, int]] = []
        for number, text in enumerate(texts):
            starts = starts_of(text)
            while starts and len(self._tokens(text, starts[-1], least)[0]) < least:
                starts.pop()
            self.places += [(number, start) for start in starts]
        if not self.places:
            raise UsageError(1025, where, f"nowhere has the {least} tokens of a prefix", "give more text, or a lower --prefix")
        self._turn, self._order = -1, list[int]()
        self._known = lru_cache(_KNOWN)(self._made)  # it is asked for when an attempt begins, and when it has ended

    def __call__(self, number: int) -> Prefix:
        """The prefix of an attempt, the same whenever it is asked."""
        return self._known(number)

    def _made(self, number: int) -> Prefix:
        turn, at = divmod(number, len(self.places))
        if turn != self._turn:
            self._turn, self._order = turn, list(range(len(self.places)))
            Random(seed_of(self._seed, "places", turn)).shuffle(self._order)
        passage, start = self.places[self._order[at]]
        length = Random(seed_of(self._seed, "length", number)).randint(self._least, self._most)
        ids, spans = self._tokens(self._texts[passage], start, length)
        kept = min(length, len(ids))
        while kept < len(ids) and kept > 1 and spans[kept][0] < spans[kept - 1][1]:  # tokens of one character
            kept -= 1
        return Prefix(self._texts[passage][start : start + spans[kept - 1][1]], self.leading + ids[:kept])

    def _tokens(self, text: str, start: int, length: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens from a place on, and where they lie behind it: some more than `length`, for the last of all may be of a word that is cut."""
        width = 5 * (length + _SPARE)
        while True:
            found = self._tokenizer(text[start : start + width], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if len(found["input_ids"]) >= length + _SPARE or start + width >= len(text):
                return list(found["input_ids"]), list(found["offset_mapping"])
            width *= 2


def in_order(attempts: Iterator[tuple[int, list[int]]], first: int) -> Iterator[tuple[int, list[int]]]:
    """Attempts by their numbers, from `first` on, so that a file of them does not depend on which ends first."""
    held: dict[int, list[int]] = {}
    for number, ids in attempts:
        held[number] = ids
        while first in held:
            yield first, held.pop(first)
            first += 1


def continue_passages(
    passages: Callable[[int], Prefix], tokenizer: PreTrainedTokenizerBase, attempts: Callable[[int], Iterator[tuple[int, list[int]]]],
    stop_ids: Sequence[int], count: int, out: Path, settings: Mapping[str, Any], *, replace: bool = False, progress: Progress = silent,
    stop_requested: Callable[[], bool] = never,
) -> Invented:  # fmt: skip
    """Write rows `{id, text}` of a prefix and what the target makes of it, each once, until there are `count` of them.

    Args:
        passages: the prefix of each attempt.
        attempts: attempts(first) -> number of an attempt, from `first` on and without end, and the tokens behind its prefix, in any order.
        settings: what rows depend on; an unfinished output of other settings is refused.

    Raises:
        OutputError: the output exists and is of other settings.
        ModelError: too many attempts in a row say nothing, or what was said before.
        StoppedError: it was asked to stop.
    """
    stops = frozenset(stop_ids)

    def shown(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def use(found: Invented, number: int, ids: list[int]) -> str:
        prefix, ended = passages(number), bool(ids) and ids[-1] in stops
        # decoded with what stands before it: alone, some tokenizers would take a space from its beginning
        said = shown(prefix.ids + ids)[len(shown(prefix.ids)) :].rstrip("\ufffd")  # half a character
        found.cut += not ended
        found.empty += not said.strip()
        return prefix.text + said if said.strip() else ""

    return collect(
        lambda first: in_order(attempts(first), first), use, "text", count, out, settings, "give more text, or a greater --temperature",
        replace=replace, progress=progress, stop_requested=stop_requested,
    )  # fmt: skip
