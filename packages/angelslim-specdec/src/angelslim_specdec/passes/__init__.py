"""Passes of this package: one a drafter."""

from .ngram import Ngram
from .suffix import Suffix

PASSES = (Ngram, Suffix)

__all__ = ["PASSES", "Ngram", "Suffix"]
