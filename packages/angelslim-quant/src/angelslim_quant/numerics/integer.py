"""Integer grids: symmetric with codes in [-2^(b-1), 2^(b-1) - 1], asymmetric with a stored zero point."""

from __future__ import annotations

import torch
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid, spread
from torch import Tensor

from .amax import amax_of, grouped


def quantize(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point (None when symmetric) of a weight.

    Args:
        weight_OI: any float dtype.
        grid: strategy "tensor", "channel" or "group".
        scale: use this scale (of `grid.scale_shape`) instead of the one the weight's range gives.
        zero_point: likewise, int8.
    """
    rows, columns = weight_OI.shape
    if scale is None:
        scale, zero_point = range_of(weight_OI, grid)
    half = 1 << (grid.bits - 1)
    codes = weight_OI.float() / spread(scale.float(), grid, rows, columns)
    codes = codes.round_()
    if zero_point is not None:
        codes += spread(zero_point.float(), grid, rows, columns)
    return codes.clamp_(-half, half - 1).to(torch.int8), scale, zero_point


def range_of(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover the weight's range.

    Symmetric: 2 amax / (2^b - 1). The grid's lowest code is used too, and the positive end is cut by half a step, which
    is no more than the rounding error anywhere else. Asymmetric: (max - min) / (2^b - 1), zero included in the range.
    """
    steps = (1 << grid.bits) - 1
    if grid.symmetric:
        return _stored(amax_of(weight_OI, grid) * 2 / steps, grid), None
    groups = grouped(weight_OI, grid).float()
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scale = _stored((high - low) / steps, grid)
    half = 1 << (grid.bits - 1)
    zero_point = (-half - low / scale.float()).round_().clamp_(-half, half - 1)
    return scale, zero_point.to(torch.int8)


def _stored(scale: Tensor, grid: Grid) -> Tensor:
    scale = scale.float().to(torch_dtype(grid.scale_dtype))
    return torch.where(scale > 0, scale, torch.ones_like(scale))
