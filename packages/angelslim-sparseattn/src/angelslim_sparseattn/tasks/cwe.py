"""Common words: ten words of a list stand there more often than all others."""

from __future__ import annotations

from random import Random

from .base import Filler, Prompt, Task
from .words import names

COMMON = 10
# how often common and other words stand in the list; common ones less often in short lists
TIMES, TIMES_SHORT, OTHER_TIMES = 30, 10, 3
SHORT = 100


class CommonWords(Task):
    """A numbered list of common words and, as its size, of others."""

    def prompt(self, rng: Random, size: int, filler: Filler) -> Prompt:
        words = names(rng, COMMON + size)
        common = words[:COMMON]
        listed = common * (TIMES_SHORT if size < SHORT else TIMES) + words[COMMON:] * OTHER_TIMES
        rng.shuffle(listed)
        context = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        text = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
            f"{context}\nQuestion: What are the {COMMON} most common words in the above list?"
        )
        return Prompt(text, f"The top {COMMON} words that appear most often in the list are:", tuple(common))
