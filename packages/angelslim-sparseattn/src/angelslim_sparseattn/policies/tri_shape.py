"""Tri-shape: A-shape, and everything for the last queries.

Source: arXiv:2412.10319 (SCBench).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..patterns import last_rows, sink, window
from ..prefill import Kept, Prefill
from .a_shape import AShape
from .base import MOST_TOKENS


class TriShape(AShape):
    """A-shape, and everything for the last queries."""

    looks_ahead: ClassVar[bool] = True

    n_last: int = Field(100, ge=0, le=MOST_TOKENS, description="last queries, rounded up to blocks")

    def keep(self, s: Prefill) -> Kept:
        return Kept(sink(s, self.n_init) | window(s, self.n_local) | last_rows(s, min(self.n_last, s.q_len - 1)))
