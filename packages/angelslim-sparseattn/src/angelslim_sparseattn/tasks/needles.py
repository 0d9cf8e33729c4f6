"""What the retrieval tasks share: statements of keys and values, scattered over filler, and a question."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .base import Filler, Prompt

INTRODUCTION = "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you about the numbers afterwards."


def statement(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def scattered(rng: Random, sentences: Sequence[str], needles: Sequence[str]) -> str:
    """The sentences with the needles, in a random order, at random places between them."""
    places = sorted(rng.choices(range(len(sentences) + 1), k=len(needles)))
    parts: list[str] = []
    for start, end, needle in zip([0, *places], places, rng.sample(needles, len(needles))):
        parts += [*sentences[start:end], needle]
    return " ".join([*parts, *sentences[places[-1] :]])


def asked(context: str, keys: Sequence[str], values: Sequence[str]) -> Prompt:
    """A question for these keys' values."""
    of = ", and ".join((", ".join(keys[:-1]), keys[-1])) if len(keys) > 1 else keys[0]
    what, verb = ("all the special magic numbers", "are") if len(values) > 1 else ("the special magic number", "is")
    text = f"{INTRODUCTION}\n{context}\nWhat {verb} {what} for {of} mentioned in the provided text?"
    return Prompt(text, f"{what[0].upper()}{what[1:]} for {of} mentioned in the provided text {verb}", tuple(values))


def hidden(rng: Random, size: int, filler: Filler, pairs: Sequence[tuple[str, str]], wanted: Sequence[str]) -> Prompt:
    """Pairs of key and value hidden among `size` sentences; asked for are all values of the wanted keys."""
    context = scattered(rng, filler.draw(rng, size), [statement(*pair) for pair in pairs])
    return asked(context, wanted, [value for key, value in pairs if key in wanted])
