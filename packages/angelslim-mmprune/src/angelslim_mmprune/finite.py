"""NaN and infinity in what a plan is made of, looked for on the device and read once, when the plan is there."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.errors import NumericError


class NotFiniteError(NumericError, ValueError):
    """Features or statistics that are NaN or infinite."""


def all_finite(valid: Tensor, *values: Tensor) -> Tensor:
    """Whether values [P, N] of the valid tokens [P, N] are all finite: a bool on their device, for `require`."""
    return torch.stack([(value.isfinite() | ~valid).all() for value in values]).all()


def require(finite: Tensor, number: int, where: str) -> None:
    """Wait for the answer of `all_finite`.

    Raises:
        NotFiniteError: it is no.
    """
    if not finite:
        raise NotFiniteError(number, where, "features or statistics are NaN or infinite", "look at the encoder's output")
