"""Distillation for angelslim-core: a student is trained towards its teacher's distributions."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chunked import head_loss
    from .hidden import hs_cosine, hs_mse
    from .kinds import KINDS, Loss
    from .losses import Sums, kd_loss, kd_sums, top_k_of, uld_loss
    from .targets import Batch, Hidden, TopK
    from .vocab_parallel import sharded_kd_sums

__version__ = "0.1.0"

_HOME_OF = {
    "head_loss": "chunked", "hs_cosine": "hidden", "hs_mse": "hidden", "KINDS": "kinds", "Loss": "kinds", "Sums": "losses", "kd_loss": "losses",
    "kd_sums": "losses", "top_k_of": "losses", "uld_loss": "losses", "Batch": "targets", "Hidden": "targets", "TopK": "targets",
    "sharded_kd_sums": "vocab_parallel",
}  # fmt: skip
__all__ = [
    "KINDS",
    "Batch",
    "Hidden",
    "Loss",
    "Sums",
    "TopK",
    "__version__",
    "head_loss",
    "hs_cosine",
    "hs_mse",
    "kd_loss",
    "kd_sums",
    "sharded_kd_sums",
    "top_k_of",
    "uld_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
