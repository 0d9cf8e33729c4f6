"""Passes of this package: one a drafter."""

from angelslim_core.passes import Pass

from .ngram import Ngram
from .suffix import Suffix
from .trained import TRAINED

PASSES: tuple[type[Pass], ...] = (Ngram, Suffix, *TRAINED)

__all__ = ["PASSES", "TRAINED", "Ngram", "Suffix"]
