"""Rounding of a trained weight to evenly spaced levels under learnt scales, and its way back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.schemes import Grid

from .amax import grouped
from .quantize_groups import LARGEST_GROUP


class Levels(NamedTuple):
    """The codes step * n + shift for whole n.

    Args:
        step: between neighbouring codes.
        shift: one of the codes.
        low, high: where weight / scale is cut off before it is rounded to the nearest code; beyond it a weight has no gradient.
    """

    step: int
    shift: int
    low: float
    high: float


def codes_of(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels) -> Tensor:
    """Codes less their zero point, fp32 [O, G, weights under a scale].

    Args:
        weight_OI: any float dtype.
        scale_OG: fp32, as it is stored; [1] if `grid` has strategy "tensor".
        zero_OG: fp32, whole numbers; None: all 0.
    """
    ratio, low, high = _ratio(weight_OI, scale_OG, zero_OG, grid, levels)
    ratio = ratio.clamp_(levels.low, levels.high) if zero_OG is None else torch.minimum(torch.maximum(ratio, low), high)
    if levels.step != 1 or levels.shift:
        return ratio.sub_(levels.shift).div_(levels.step).round_().mul_(levels.step).add_(levels.shift)
    return ratio.round_()


def _ratio(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """weight / scale in fp32, and what bounds it."""
    ratio = grouped(weight_OI, grid).float() / scale_OG[..., None]
    zero = torch.zeros_like(scale_OG[..., None]) if zero_OG is None else zero_OG[..., None]
    return ratio, levels.low - zero, levels.high - zero


def reference(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels) -> Tensor:
    """The rounded weight [O, I]: (code - zero point) * scale, computed in fp32, in the dtype of the weight. As `codes_of`."""
    codes = codes_of(weight_OI, scale_OG, zero_OG, grid, levels)
    return codes.mul_(scale_OG[..., None]).to(weight_OI.dtype).reshape(weight_OI.shape)


def reference_back(
    slope_OI: Tensor, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels, with_weight: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the weight [O, I], in its dtype, and of the scales [O, G], fp32, straight through the rounding.

    Inside the range a weight has its result's gradient and a scale gets (code - weight / scale) times it, outside the weight
    has none and the scale gets the code times it.

    Args:
        slope_OI: gradient of the rounded weight.
        with_weight: whether the weight's is wanted, else it is None.
    """
    ratio, low, high = _ratio(weight_OI, scale_OG, zero_OG, grid, levels)
    inside = (ratio >= low) & (ratio <= high)
    codes = codes_of(weight_OI, scale_OG, zero_OG, grid, levels)
    slope = grouped(slope_OI, grid)
    scale_slope = codes.sub_(ratio.mul_(inside)).mul_(slope).sum(-1)
    found = torch.where(inside, slope, 0).to(weight_OI.dtype).reshape(weight_OI.shape) if with_weight else None
    return found, scale_slope


def _triton(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels) -> Tensor:
    from .triton.round_levels import round_levels

    return round_levels(weight_OI, scale_OG, zero_OG, grid, levels)


def _triton_back(
    slope_OI: Tensor, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels, with_weight: bool
) -> tuple[Tensor | None, Tensor]:
    from .triton.round_levels import round_levels_back

    return round_levels_back(slope_OI, weight_OI, scale_OG, zero_OG, grid, levels, with_weight)


def _held(weight_OI: Tensor, scale_OG: Tensor) -> tuple[bool, str]:
    held = scale_OG.ndim == 2 and weight_OI.shape[1] <= LARGEST_GROUP * scale_OG.shape[1]
    return weight_OI.is_cuda and held, f"groups or channels of at most {LARGEST_GROUP} weights on a GPU"


def _on_gpu(weight_OI: Tensor, scale_OG: Tensor, *_: object) -> tuple[bool, str]:
    return _held(weight_OI, scale_OG)


def _back_on_gpu(slope_OI: Tensor, weight_OI: Tensor, scale_OG: Tensor, *_: object) -> tuple[bool, str]:
    return _held(weight_OI, scale_OG)


ROUND_LEVELS = Kernel("quant.round_levels", reference, (Implementation("triton", _triton, _on_gpu, triton_runs), Implementation("torch", reference)))
ROUND_LEVELS_BACK = Kernel(
    "quant.round_levels_back", reference_back, (Implementation("triton", _triton_back, _back_on_gpu, triton_runs), Implementation("torch", reference_back))
)
