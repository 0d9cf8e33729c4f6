"""VisionZip for audio: what it is compared as where Samp was published (its released code; see `samp`)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from .base import Modality
from .visionzip import VisionZip


class VisionZipAudio(VisionZip):
    """Keep and merge tokens of a clip as `visionzip` does; contextual ones are a share of all of its tokens."""

    name = "visionzip_audio"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})

    contextual: float = Field(0.05, ge=0, le=1, description="share of all tokens that others are merged into; at least one is, and no more than stay")

    def contexts(self, tokens: int, keep: int) -> int:
        return min(keep, max(1, round(self.contextual * tokens)))
