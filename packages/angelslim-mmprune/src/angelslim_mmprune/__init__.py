"""Multimodal token pruning for angelslim-core: fewer vision and audio tokens in the language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coupling import Coupling, attach, attached
    from .handoff import plan_from_features, planned_count
    from .installed import attachment
    from .marginal_relevance import mmr
    from .merging import samp
    from .strategies import make_strategy

__version__ = "0.1.0"

_HOME_OF = {
    "attach": "coupling", "attached": "coupling", "Coupling": "coupling", "attachment": "installed", "plan_from_features": "handoff",
    "planned_count": "handoff", "mmr": "marginal_relevance", "samp": "merging", "make_strategy": "strategies",
}  # fmt: skip
__all__ = ["Coupling", "__version__", "attach", "attached", "attachment", "make_strategy", "mmr", "plan_from_features", "planned_count", "samp"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
