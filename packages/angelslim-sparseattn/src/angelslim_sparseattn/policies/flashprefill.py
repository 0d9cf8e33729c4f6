"""FlashPrefill: blocks whose mean key scores within a factor of the row's best."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..estimators import mean_key_mass
from ..kernels.select_rows import SELECT_ROWS, Rule
from ..patterns import causal
from ..prefill import Kept, Prefill
from .base import MOST_TOKENS, Policy


class FlashPrefill(Policy):
    """First, near and last blocks, and those with at least alpha times the row's highest mass."""

    looks_ahead: ClassVar[bool] = False  # but for the last rows

    alpha: float = Field(0.2, ge=-1, le=1, description="share of the highest mass; 0 and below: everything is kept")
    n_init: int = Field(256, ge=0, le=MOST_TOKENS, description="first tokens")
    n_local: int = Field(512, ge=0, le=MOST_TOKENS, description="tokens up to a query's block")
    n_last: int = Field(256, ge=0, le=MOST_TOKENS, description="last queries that attend to everything")

    def keep(self, s: Prefill) -> Kept:
        if self.alpha <= 0:
            return Kept(causal(s))
        rule = Rule("at_least", share=self.alpha, n_init=self.n_init, n_local=self.n_local, n_last=self.n_last)
        return Kept(lists=SELECT_ROWS(s, mean_key_mass(s), rule))
