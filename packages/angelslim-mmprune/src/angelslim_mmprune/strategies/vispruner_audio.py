"""VisPruner for audio: what it is compared as where Samp was published (its released code; see `samp`)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..plan import Statistic
from .base import Modality
from .vispruner import VisPruner


class VisPrunerAudio(VisPruner):
    """Keep tokens of a clip as `vispruner` does: attention is the largest of the heads, summed over queries, and 4 tokens go at once."""

    name = "vispruner_audio"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})

    step: int = Field(4, ge=1, le=2**20, description="most tokens that go at once")

    @property
    def statistic(self) -> Statistic:
        return "pooled_max"
