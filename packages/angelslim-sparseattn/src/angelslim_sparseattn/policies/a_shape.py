"""A-shape: the first tokens and a window.

Source: arXiv:2309.17453 (StreamingLLM).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..patterns import sink, window
from ..prefill import Kept, Prefill
from .base import MOST_TOKENS, Policy


class AShape(Policy):
    """First tokens and a window, rounded up to blocks."""

    looks_ahead: ClassVar[bool] = False

    n_init: int = Field(128, ge=0, le=MOST_TOKENS, description="first tokens")
    n_local: int = Field(3968, ge=0, le=MOST_TOKENS, description="tokens before a query")

    def keep(self, s: Prefill) -> Kept:
        return Kept(sink(s, self.n_init) | window(s, self.n_local))
