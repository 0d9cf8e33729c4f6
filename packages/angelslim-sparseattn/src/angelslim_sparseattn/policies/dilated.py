"""Dilated: the first tokens, a window, and every few blocks before it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..patterns import every, sink, window
from ..prefill import Kept, Prefill
from .base import MOST_BLOCKS, MOST_TOKENS, Policy


class Dilated(Policy):
    """First tokens, a window, and every `stride`-th block before it."""

    looks_ahead: ClassVar[bool] = False

    n_init: int = Field(1024, ge=0, le=MOST_TOKENS, description="first tokens")
    n_local: int = Field(2048, ge=0, le=MOST_TOKENS, description="tokens before a query that are all kept")
    stride: int = Field(2, ge=1, le=MOST_BLOCKS, description="blocks: one of so many is kept before the window")

    def keep(self, s: Prefill) -> Kept:
        return Kept(sink(s, self.n_init) | window(s, self.n_local) | every(s, self.stride))
