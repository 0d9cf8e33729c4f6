"""Decoding with the suffix drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from .base import Drafting, TrainingFree, others

if TYPE_CHECKING:
    from ..drafters.base import Drafter


class Suffix(TrainingFree):
    """Speculative decoding without a draft model: proposes what most often followed the longest runs seen before."""

    id = "specdec.suffix"
    conflicts = others("suffix")

    class Config(Drafting):
        depth: int = Field(24, ge=2, le=128, description="longest run that is kept, tokens")
        factor: float = Field(1.0, gt=0, le=8, description="tokens proposed for each token that matches, at most")
        least: float = Field(0.1, gt=0, le=1, description="probability of all proposed tokens together, by what followed before")

    @classmethod
    def drafter(cls, config: Any) -> Drafter:
        from ..drafters.suffix import Suffix as Proposer

        return Proposer(config.depth, config.factor, config.least)
