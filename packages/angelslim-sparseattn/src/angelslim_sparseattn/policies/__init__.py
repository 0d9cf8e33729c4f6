"""Policies: one file a method, each combining pattern, estimator, selector and budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from angelslim_core.errors import UsageError

if TYPE_CHECKING:
    from .base import Policy

CLASSES = {
    "a_shape": "AShape",
    "tri_shape": "TriShape",
    "dilated": "Dilated",
    "minference": "MInference",
    "flexprefill": "FlexPrefill",
    "xattention": "XAttention",
    "flashprefill": "FlashPrefill",
    "vecattention": "VecAttention",
    "cosa": "CoSA",
    "stem": "Stem",
}


def make_policy(name: str, **options: Any) -> Policy:
    """The policy of that name with these options.

    Raises:
        UsageError: no such policy or option, or a value that does not fit.
    """
    if name not in CLASSES:
        raise UsageError(520, "make_policy", f"no policy {name!r}", f"choose one of: {', '.join(CLASSES)}")
    kind = getattr(import_module(f".{name}", __name__), CLASSES[name])
    try:
        policy: Policy = kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise UsageError(521, where, first["msg"], f"options of {name}: {', '.join(kind.model_fields)}") from error
    return policy
