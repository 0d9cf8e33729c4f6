"""XAttention: blocks by the attention of antidiagonal sums, as many as hold a share of it.

Source: arXiv:2503.16428.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..estimators import antidiagonal_mass
from ..kernels.select_rows import SELECT_ROWS, Rule
from ..prefill import Kept, Prefill
from .strided import Strided


class XAttention(Strided):
    """Block 0, own blocks, and the heaviest while the mass before is below a share tau."""

    looks_ahead: ClassVar[bool] = False

    tau: float = Field(0.9, ge=0, le=1, description="share of the estimated attention to keep")

    def keep(self, s: Prefill) -> Kept:
        rule = Rule("top_p", share=self.tau, n_init=1)
        return Kept(lists=SELECT_ROWS(s, antidiagonal_mass(s, self.stride), rule))
