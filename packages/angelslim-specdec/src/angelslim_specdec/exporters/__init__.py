"""Drafts as engines store them, one file a layout."""

from .base import Facts, Given, Layout, Served
from .sglang import SGLang
from .speculators import Speculators
from .vllm import VLLM
from .zlab import ZLab

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (VLLM(), SGLang(), Speculators(), ZLab())}

__all__ = ["LAYOUTS", "Facts", "Given", "Layout", "Served"]
