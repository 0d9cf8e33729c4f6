"""The layout in which DFlash's authors publish their drafts; without their remote code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Facts, Fields, Given, Layout
from .vllm import block_facts, block_fields


class ZLab(Layout):
    """DFlash with the target's own head."""

    name = "zlab"
    renamed: ClassVar[Mapping[str, Mapping[str, str]]] = {"dflash": {}}

    def lacks(self, given: Given) -> str:
        return "" if given.full_vocabulary else "a DFlash draft there has the target's whole vocabulary"

    def config(self, given: Given) -> dict[str, Any]:
        return block_fields(given)

    def facts(self, config: Fields, given: Given) -> Facts:
        return block_facts(config, given, config.whole("vocab_size", 0))

    def serve(self, given: Given, folder: str) -> str:
        return f"DFlashDraftModel.from_pretrained({folder!r})"
