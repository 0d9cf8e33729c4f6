"""One key with four values hidden in filler; all are asked for."""

from __future__ import annotations

from random import Random

from .base import Filler, Prompt, Task
from .needles import hidden
from .words import names, numbers


class NiahMultivalue(Task):
    """One key, four values."""

    def prompt(self, rng: Random, size: int, filler: Filler) -> Prompt:
        keys, values = names(rng, 1), numbers(rng, 4)
        return hidden(rng, size, filler, [(keys[0], value) for value in values], keys)
