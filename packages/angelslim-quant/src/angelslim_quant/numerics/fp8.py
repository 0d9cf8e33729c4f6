"""FP8 E4M3FN: largest value 448, no infinity; an unclamped cast overflows to NaN, so every cast here clamps first."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.rounding import E4M3_MAX, cast_e4m3
from angelslim_core.schemes import Grid, against, pieces, scale_rows

from ..kernels.round_columns import Steps
from .amax import amax_of


def scale_of(amax: Tensor, grid: Grid) -> Tensor:
    """amax / 448 in the dtype it is stored in; 1 where amax is 0 or the scale would underflow."""
    scale = (amax.float() / E4M3_MAX).to(torch_dtype(grid.scale_dtype))
    return torch.where(scale > 0, scale, torch.ones_like(scale))


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
    if scale is None:
        scale = scale_of(amax_of(weight_OI, grid), grid)
    codes = torch.empty(weight_OI.shape, dtype=torch.float8_e4m3fn, device=weight_OI.device)
    for rows in pieces(weight_OI, grid):
        values, scales = against(weight_OI[rows].float(), scale_rows(scale, rows, grid).float(), grid)
        codes[rows] = cast_e4m3(values / scales).reshape(values.shape)
    return codes, scale
