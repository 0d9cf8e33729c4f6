"""Four keys hidden in filler; all are asked for."""

from __future__ import annotations

from random import Random

from .base import Filler, Prompt, Task
from .needles import hidden
from .words import names, numbers


class NiahMultiquery(Task):
    """Four keys with a value each."""

    def prompt(self, rng: Random, size: int, filler: Filler) -> Prompt:
        keys, values = names(rng, 4), numbers(rng, 4)
        return hidden(rng, size, filler, list(zip(keys, values)), keys)
