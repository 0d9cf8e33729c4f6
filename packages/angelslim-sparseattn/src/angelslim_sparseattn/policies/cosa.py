"""CoSA: XAttention's scores, blocks that own a row's maximum first, and a skip while attention runs.

Source: arXiv:2607.25291.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..estimators import antidiagonal_mass
from ..kernels.select_rows import SELECT_ROWS, Rule
from ..prefill import Kept, Prefill
from .base import MOST_TOKENS
from .strided import Strided


class CoSA(Strided):
    """Own blocks, block 0, owners of row maxima by mass, the rest by mass, while the mass before is below a share p."""

    looks_ahead: ClassVar[bool] = False

    p: float = Field(0.95, ge=0, le=1, description="share of the estimated mass to keep")
    delta: float = Field(1000, ge=-MOST_TOKENS, le=MOST_TOKENS, description="blocks below ln(delta / N) of the running maximum are skipped; negative: none")

    @property
    def ordered(self) -> bool:
        return True

    def scratch_bytes(self, s: Prefill) -> int:
        return 32 * s.rows * s.columns

    def keep(self, s: Prefill) -> Kept:
        rule = Rule("top_p", share=self.p, n_init=1, ordered=True)
        return Kept(lists=SELECT_ROWS(s, antidiagonal_mass(s, self.stride, owners=True), rule), delta=self.delta)
