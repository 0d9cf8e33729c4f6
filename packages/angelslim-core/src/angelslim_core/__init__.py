"""AngelSlim's core: model adapters, plugins, recipes and the streaming pipeline. Names here are the public interface."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.base import Layout, Site
    from .context import Context
    from .errors import AngelslimError
    from .evaluation import evaluate
    from .exporters import Exporter, TensorSpec
    from .hookspecs import hookimpl
    from .inspection import inspect_model
    from .kernels import Implementation, Kernel
    from .layer import Layer
    from .loading import load
    from .passes import LayerPass, ModelPass, Pass, PassConfig, RuntimePass, SourcePass, TensorPass, TrainedPass
    from .pipeline import compress
    from .plugins import PluginHost
    from .recipe import load_recipe
    from .schemes import Grid, Quantized, Scheme
    from .validation import validate

__version__ = "0.1.0"

_HOMES = {
    "adapters.base": ("Layout", "Site"),
    "context": ("Context",),
    "errors": ("AngelslimError",),
    "evaluation": ("evaluate",),
    "exporters": ("Exporter", "TensorSpec"),
    "hookspecs": ("hookimpl",),
    "inspection": ("inspect_model",),
    "kernels": ("Implementation", "Kernel"),
    "loading": ("load",),
    "passes": ("LayerPass", "ModelPass", "Pass", "PassConfig", "RuntimePass", "SourcePass", "TensorPass", "TrainedPass"),
    "pipeline": ("compress",),
    "plugins": ("PluginHost",),
    "recipe": ("load_recipe",),
    "schemes": ("Grid", "Quantized", "Scheme"),
    "layer": ("Layer",),
    "validation": ("validate",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value  # a function may share its module's name: the function wins
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
