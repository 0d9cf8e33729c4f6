"""Nothing but keys and values, one of them asked for."""

from __future__ import annotations

from random import Random

from .base import Filler, Prompt, Task
from .needles import hidden
from .words import names, numbers


class NiahMultikey2(Task):
    """As many keys, with a value each, as fit; no filler."""

    def prompt(self, rng: Random, size: int, filler: Filler) -> Prompt:
        keys, values = names(rng, size + 1), numbers(rng, size + 1)
        return hidden(rng, 0, filler, list(zip(keys, values)), keys[:1])
