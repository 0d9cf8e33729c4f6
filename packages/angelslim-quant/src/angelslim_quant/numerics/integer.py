"""Integer grids: codes in [-2^(b-1), 2^(b-1) - 1]; asymmetric ones store a zero point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid, against, pieces, scale_rows

from ..kernels.round_columns import Steps
from .amax import extremes, grouped


def quantize(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point (None when symmetric) of a weight.

    Args:
        weight_OI: any float dtype.
        grid: strategy "tensor", "channel" or "group".
        scale: use this scale (of `grid.scale_shape`) instead of the one the weight's range gives.
        zero_point: likewise, int8.
    """
    if scale is None:
        scale, zero_point = scale_of(*range_of(weight_OI, grid), grid)
    codes = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    for rows in pieces(weight_OI, grid):
        codes[rows] = _codes(weight_OI[rows], scale_rows(scale, rows, grid), scale_rows(zero_point, rows, grid), grid)
    return codes, scale, zero_point


def _codes(weight_OI: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes in fp32."""
    half = 1 << (grid.bits - 1)
    values, scales = against(weight_OI.float(), scale.float(), grid)
    codes = (values / scales).round_()
    if zero_point is not None:
        codes += against(weight_OI, zero_point.float(), grid)[1]
    return codes.clamp_(-half, half - 1).reshape(weight_OI.shape)


def range_of(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """fp32 lowest and highest weight of whatever shares a scale, zero included; of `grid.scale_shape`."""
    low, high = extremes(weight_OI, grid)
    return low.clamp_(max=0), high.clamp_(min=0)


def scale_of(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale, in the dtype it is stored in, and zero point for a range.

    Symmetric: max(-low / 2^(b-1), high / (2^(b-1) - 1)), the finest scale that cuts neither end. Asymmetric:
    (high - low) / (2^b - 1). A range of zero gets scale 1.
    """
    steps, half = (1 << grid.bits) - 1, 1 << (grid.bits - 1)
    exact = torch.maximum(-low / half, high / (half - 1)) if grid.symmetric else (high - low) / steps
    scale = exact.to(torch_dtype(grid.scale_dtype))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if grid.symmetric:
        return scale, None
    return scale, (-half - low / scale.float()).round_().clamp_(-half, half - 1).to(torch.int8)


def steps(scale_OG: Tensor, zero_point_OG: Tensor | None, grid: Grid) -> Steps:
    """The values that `quantize` rounds to with the scales given, for `compensate`."""
    zero = None if zero_point_OG is None else zero_point_OG.float().T.contiguous()
    return Steps(scale_OG.float().T.contiguous(), zero, "int", 1 << (grid.bits - 1))


def search_range(weight_OI: Tensor, grid: Grid, importance_I: Tensor, shrinks: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for the shrunk range of least error, per whatever shares a scale.

    The error is sum_i importance_i (w_i - q_i)^2; the unshrunk range is always a candidate.

    Args:
        importance_I: weight of the squared error of each input, at least 0.
        shrinks: factors of the range to try besides 1.
    """
    low, high = range_of(weight_OI, grid)
    best_scale, best_zero = scale_of(low, high, grid)

    weight = weight_OI.float()
    half = 1 << (grid.bits - 1)
    weights = grouped(importance_I.float().expand_as(weight), grid)

    def loss(scale: Tensor, zero: Tensor | None) -> Tensor:
        values, scales = against(weight, scale.float(), grid)
        found = (values / scales).round_()  # in place from here on: most of the search's time is memory
        if zero is None:
            found.clamp_(-half, half - 1)
        else:
            offset = against(weight, zero.float(), grid)[1]
            found.add_(offset).clamp_(-half, half - 1).sub_(offset)
        return grouped(found.mul_(scales).sub_(values).square_().reshape(weight.shape), grid).mul_(weights).sum(-1)

    best = loss(best_scale, best_zero)
    for shrink in shrinks:
        scale, zero = scale_of(low * shrink, high * shrink, grid)
        found = loss(scale, zero)
        better = found < best
        best = torch.where(better, found, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
