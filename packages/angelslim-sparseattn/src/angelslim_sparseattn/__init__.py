"""Sparse attention for angelslim-core: training-free policies, and attention over the blocks they keep."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import select, sparse_attention
    from .block_index import BlockIndex
    from .config import SparseAttentionConfig
    from .coupling import attach, attachment, captured
    from .policies import make_policy

__version__ = "0.1.0"

_HOME_OF = {
    "select": "attention", "sparse_attention": "attention", "BlockIndex": "block_index", "make_policy": "policies", "SparseAttentionConfig": "config",
    "attach": "coupling", "attachment": "coupling", "captured": "coupling",
}  # fmt: skip
__all__ = ["BlockIndex", "SparseAttentionConfig", "__version__", "attach", "attachment", "captured", "make_policy", "select", "sparse_attention"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
