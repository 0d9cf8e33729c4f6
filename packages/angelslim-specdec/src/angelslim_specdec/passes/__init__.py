"""Passes of this package: one a drafter."""

from .ngram import Ngram
from .suffix import Suffix
from .trained import TRAINED

PASSES = (Ngram, Suffix, *TRAINED)

__all__ = ["PASSES", "TRAINED", "Ngram", "Suffix"]
