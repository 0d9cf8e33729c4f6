"""Passes that train a model towards a teacher."""

from __future__ import annotations

from .blockwise import Blockwise
from .logits import Logits
from .on_policy import OnPolicy
from .qad import Qad

PASSES = (Logits, Qad, Blockwise, OnPolicy)
