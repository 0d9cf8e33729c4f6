"""Frequent words: coined words whose number falls with the square of their rank; asked for are the three after the first."""

from __future__ import annotations

from random import Random

from .base import Filler, Prompt, Task
from .words import coined

# words that the shortest text has, so that no two of the first ranks are equally frequent
LEAST = 200
NOISE, ASKED = "...", 3


class FrequentWords(Task):
    """Coded text; its most frequent word is noise."""

    def prompt(self, rng: Random, size: int, filler: Filler) -> Prompt:
        count = LEAST + size
        ranked = [NOISE, *coined(rng, count)]
        share = 6 / 3.1416**2  # the sum of all 1 / rank ** 2
        listed = [word for rank, word in enumerate(ranked, 1) for _ in range(round(count * share / rank**2))]
        listed += ranked[-(count - len(listed)) :] if len(listed) < count else []  # the tail, once each
        rng.shuffle(listed)
        text = (
            f'Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "{" ".join(listed)}"\n'
            f"Question: Do not provide any explanation. Please ignore the dots '{NOISE}'. What are the three most frequently appeared words in the above coded text?"
        )
        begin = "According to the coded text above, the three most frequently appeared words are:"
        return Prompt(text, begin, tuple(ranked[1 : 1 + ASKED]))
