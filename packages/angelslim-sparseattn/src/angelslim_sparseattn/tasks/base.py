"""What a task is, and how it is made as long as wanted for a tokenizer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from angelslim_core.errors import UsageError

from .words import sentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of a length, what may be left over
_SLACK = 0.01


class Filler:
    """Sentences around what a task asks for: of a text, from a random one on and around its end, or generated.

    Args:
        text: None: generated.

    Raises:
        UsageError: the text has no sentence.
    """

    def __init__(self, text: str | None = None) -> None:
        self._sentences = None if text is None else [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if len(s.split()) > 2]
        if self._sentences == []:
            raise UsageError(596, "text", "has no sentence of three words")

    def draw(self, rng: Random, count: int) -> list[str]:
        """So many sentences."""
        if self._sentences is None:
            return [sentence(rng) for _ in range(count)]
        start = rng.randrange(len(self._sentences))
        return [self._sentences[(start + i) % len(self._sentences)] for i in range(count)]


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Args:
        text: context and question.
        begin: how the answer begins; the model goes on from there.
        answers: each counts if it stands in what the model writes.
    """

    text: str
    begin: str
    answers: tuple[str, ...]


class Task(ABC):
    """A generator of prompts."""

    @abstractmethod
    def prompt(self, rng: Random, size: int, filler: Filler) -> Prompt:
        """A prompt; more tokens for a larger `size`, which may be 0."""


@dataclass(frozen=True)
class Sample:
    """One prompt as a model reads it.

    Args:
        ids: the prompt's tokens.
        new_tokens: how many the model may write; with the prompt's no more than the length asked for.
        answers: see `Prompt`.
    """

    ids: tuple[int, ...]
    new_tokens: int
    answers: tuple[str, ...]


def sample(name: str, task: Task, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, filler: Filler) -> Sample:
    """The prompt of a seed, at most `length` tokens with its answer, and hardly less.

    Raises:
        UsageError: not even the shortest prompt fits.
    """

    def made(size: int) -> Sample:
        prompt = task.prompt(Random(f"{name} {length} {seed}"), size, filler)
        room = 2 * len(tokenizer(", ".join(prompt.answers), add_special_tokens=False)["input_ids"]) + 16
        return Sample(tuple(_tokens(tokenizer, prompt)), room, prompt.answers)

    def total(found: Sample) -> int:
        return len(found.ids) + found.new_tokens

    best, low, high, guess = made(0), 0, None, 64
    if total(best) > length:
        raise UsageError(597, name, f"takes at least {total(best)} tokens, more than {length}", "choose a greater length")
    shortest = total(best)
    while (high is None or high - low > 1) and total(best) < (1 - _SLACK) * length:
        found = made(guess)
        if total(found) > length:
            high = guess
        else:
            best, low = found, guess
        each = max(1e-3, (total(found) - shortest) / guess)  # tokens a unit of size
        guess = low + max(1, int((length - total(best)) / each))
        guess = guess if high is None else min(guess, high - 1)
    return best


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Sequence[int]:
    if tokenizer.chat_template is None:
        return tokenizer(f"{prompt.text}\n{prompt.begin}", verbose=False)["input_ids"]  # type: ignore[no-any-return]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True)
    return tokenizer(f"{chat}{prompt.begin}", add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def score(written: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand, as whole words and in any case, in what was written."""
    return sum(bool(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", written, re.IGNORECASE)) for a in answers) / len(answers)
