"""NaN and infinity in what a plan is made of, looked for on the device and read once, when the plan is there."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.errors import NumericError


class NotFiniteError(NumericError, ValueError):
    """Features or statistics that are NaN, infinite, or so large that a token's length is."""


def all_finite(valid: Tensor, *values: Tensor) -> Tensor:
    """Whether values [P, N] or [P, N, D] of the valid tokens [P, N] are all finite, and lengths too: a bool on their device, for `require`."""
    return torch.stack([((value if value.ndim == 2 else norms(value)).isfinite() | ~valid).all() for value in values]).all()


def norms(features: Tensor) -> Tensor:
    """[..., N] of features [..., N, D], in FP32, or FP64 as they are."""
    return torch.linalg.vector_norm(features, dim=-1, dtype=torch.promote_types(features.dtype, torch.float32))


def require(finite: Tensor, number: int, where: str) -> None:
    """Wait for the answer of `all_finite`.

    Raises:
        NotFiniteError: it is no.
    """
    if not finite:
        raise NotFiniteError(number, where, "features or statistics are NaN or infinite", "look at the model's inputs, its dtype and the encoder's output")
