"""One number hidden in filler."""

from __future__ import annotations

from random import Random

from .base import Filler, Prompt, Task
from .needles import hidden
from .words import names, numbers


class NiahSingle(Task):
    """One key, one value."""

    def prompt(self, rng: Random, size: int, filler: Filler) -> Prompt:
        keys, values = names(rng, 1), numbers(rng, 1)
        return hidden(rng, size, filler, list(zip(keys, values)), keys)
