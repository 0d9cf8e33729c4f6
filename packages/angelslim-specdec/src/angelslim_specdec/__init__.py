"""Speculative decoding for angelslim-core: drafts, their training, and decoding with exactly the target's outputs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drafters.base import Drafter, Proposal, Warp
    from .engine import Engine
    from .generation import generate
    from .spec_exit import SpecExit
    from .stop_strings import StopStrings
    from .streaming import stream
    from .target import Target

__version__ = "0.1.0"

_HOME_OF = {
    "Drafter": "drafters.base", "Engine": "engine", "Proposal": "drafters.base", "SpecExit": "spec_exit", "StopStrings": "stop_strings", "Target": "target",
    "Warp": "drafters.base", "generate": "generation", "stream": "streaming",
}  # fmt: skip
__all__ = ["Drafter", "Engine", "Proposal", "SpecExit", "StopStrings", "Target", "Warp", "__version__", "generate", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
