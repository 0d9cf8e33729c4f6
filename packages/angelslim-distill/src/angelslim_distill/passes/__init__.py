"""Passes that train a model towards a teacher."""

from __future__ import annotations

from .logits import Logits
from .qad import Qad

PASSES = (Logits, Qad)
