"""Variable tracking: a chain of assignments hidden in filler; asked for are the variables that hold its value."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from .base import Filler, Prompt, Task
from .words import coined

HOPS = 4
INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text."


class VariableTracking(Task):
    """A value and four hops, in order."""

    def prompt(self, rng: Random, size: int, filler: Filler) -> Prompt:
        variables = coined(rng, HOPS + 1, 5, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        value = str(rng.randrange(10000, 100000))
        lines = [f"VAR {variables[0]} = {value}."] + [f"VAR {new} = VAR {old}." for old, new in pairwise(variables)]
        sentences = filler.draw(rng, size)
        for line, place in reversed(list(zip(lines, sorted(rng.choices(range(size + 1), k=len(lines)))))):
            sentences.insert(place, line)
        question = f"Find all variables that are assigned the value {value} in the text above."
        begin = f"According to the chain(s) of variable assignment in the text above, {len(variables)} variables are assigned the value {value}, they are:"
        return Prompt(f"{INTRODUCTION}\n\n{' '.join(sentences)}\n\nQuestion: {question}", begin, tuple(variables))
