"""Multimodal token pruning for angelslim-core: fewer vision and audio tokens in the language model."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attachment import attachment
    from .coupling import Coupling, attach, attached
    from .handoff import plan_from_features, planned_count
    from .mmr import mmr
    from .samp import samp
    from .strategies import make_strategy

__version__ = "0.1.0"

_HOME_OF = {
    "attach": "coupling", "attached": "coupling", "Coupling": "coupling", "attachment": "attachment", "plan_from_features": "handoff",
    "planned_count": "handoff", "mmr": "mmr", "samp": "samp", "make_strategy": "strategies",
}  # fmt: skip
__all__ = ["Coupling", "__version__", "attach", "attached", "attachment", "make_strategy", "mmr", "plan_from_features", "planned_count", "samp"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


class _Package(ModuleType):
    """`mmr` and `samp` are functions here, and files of these names, which importing a file would put in the place of its function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME_OF or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
