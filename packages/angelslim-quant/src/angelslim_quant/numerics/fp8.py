"""FP8 E4M3FN: largest value 448, no infinity; an unclamped cast overflows to NaN, so every cast here clamps first."""

from __future__ import annotations

from torch import Tensor

from angelslim_core.rounding import E4M3_MAX, cast_e4m3
from angelslim_core.schemes import Grid

from ..kernels.quantize_fp8 import QUANTIZE_FP8, scale_of
from ..kernels.round_columns import Steps

__all__ = ["E4M3_MAX", "cast_e4m3", "element_steps", "quantize", "scale_of"]


def element_steps(scale: Tensor, outputs: int) -> Steps:
    """The FP8 values that `quantize` rounds to under one scale [1], for `compensate`."""
    return Steps(scale.float().expand(1, outputs).contiguous(), None, "e4m3")


def quantize(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scale of a weight.

    Args:
        weight_OI: any float dtype.
        grid: strategy "tensor", "channel" or "block".
        scale: use this scale (of `grid.scale_shape`) instead of absmax / 448.
    """
    return QUANTIZE_FP8(weight_OI, grid, scale)
