"""Integer grids: codes in [-2^(b-1), 2^(b-1) - 1]; asymmetric ones store a zero point."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from angelslim_core.schemes import Grid

from ..kernels.quantize_groups import QUANTIZE_GROUPS, range_of, scale_of
from ..kernels.round_columns import Steps
from ..kernels.search_range import SEARCH_RANGE

__all__ = ["quantize", "range_of", "scale_of", "search_range", "steps"]


def quantize(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point (None when symmetric) of a weight.

    Args:
        weight_OI: any float dtype.
        grid: strategy "tensor", "channel" or "group".
        scale: use this scale (of `grid.scale_shape`) instead of the one the weight's range gives.
        zero_point: likewise, int8.
    """
    return QUANTIZE_GROUPS(weight_OI, grid, scale, zero_point)


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
    return SEARCH_RANGE(weight_OI, grid, importance_I, shrinks)
