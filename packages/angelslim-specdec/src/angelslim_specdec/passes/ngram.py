"""Decoding with the n-gram drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from .base import Drafting, TrainingFree, others

if TYPE_CHECKING:
    from ..drafters.base import Drafter


class Ngram(TrainingFree):
    """Speculative decoding without a draft model: proposes what followed the last time the same few tokens stood there."""

    id = "specdec.ngram"
    conflicts = others("ngram")

    class Config(Drafting):
        longest: int = Field(5, ge=1, le=32, description="tokens that are compared at most")
        shortest: int = Field(2, ge=1, le=32, description="with fewer in common nothing is proposed")

        @model_validator(mode="after")
        def _ordered(self) -> Any:
            if self.shortest > self.longest:
                raise ValueError(f"shortest {self.shortest} is more than longest {self.longest}")
            return self

    @classmethod
    def drafter(cls, config: Any) -> Drafter:
        from ..drafters.ngram import Ngram as Proposer

        return Proposer(config.longest, config.shortest)
