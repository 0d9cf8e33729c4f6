"""Finding what `attach`, or `load`, has attached to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .coupling import Coupling

if TYPE_CHECKING:
    from torch.nn import Module


def attachment(model: Module) -> Coupling | None:
    """The coupling whose hooks a model has, of several the first; None: it has none, or they were removed."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Coupling)), None)
