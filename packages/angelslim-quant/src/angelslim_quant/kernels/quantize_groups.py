"""Rounding to integers: absmax or range, scale, zero point and codes of groups of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.schemes import Grid, against, pieces

from .amax import grouped

# weights under one scale that a GPU program holds in registers
LARGEST_GROUP = 1 << 14


def range_of(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """fp32 lowest and highest weight of whatever shares a scale, zero included; of `grid.scale_shape`."""
    values = grouped(weight_OI, grid)  # on the CPU `amin` and `amax` of one axis take a fraction of the time of `aminmax`
    return values.amin(-1).float().clamp_(max=0), values.amax(-1).float().clamp_(min=0)


def scale_of(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale, in the dtype it is stored in, and zero point for a range.

    Symmetric: max(-low / 2^(b-1), high / (2^(b-1) - 1)), the finest scale that cuts neither end. Asymmetric:
    (high - low) / (2^b - 1). A range of zero gets scale 1.
    """
    half = 1 << (grid.bits - 1)
    # a tensor on the device: PyTorch multiplies by the inverse of a number on GPUs, which is another result
    steps = low.new_full((), half - 1 if grid.symmetric else 2 * half - 1)
    exact = torch.maximum(-low / half, high / steps) if grid.symmetric else (high - low) / steps
    scale = exact.to(torch_dtype(grid.scale_dtype))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if grid.symmetric:
        return scale, None
    return scale, (-half - low / scale.float()).round_().clamp_(-half, half - 1).to(torch.int8)


def reference(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (int8), scale and zero point (None when symmetric) of a weight.

    Args:
        weight_OI: any float dtype, finite.
        grid: integer, strategy "tensor", "channel" or "group".
        scale: use this scale (of `grid.scale_shape`) instead of the one the weight's range gives.
        zero_point: likewise, int8.
    """
    if scale is None:
        scale, zero_point = scale_of(*range_of(weight_OI, grid), grid)
    return _codes(weight_OI.float(), scale, zero_point, grid).to(torch.int8), scale, zero_point


def _codes(values_OI: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    half = 1 << (grid.bits - 1)
    values, scales = against(values_OI, scale.float(), grid)
    codes = (values / scales).round_()
    if zero_point is not None:
        codes += against(values_OI, zero_point.float(), grid)[1]
    return codes.clamp_(-half, half - 1).reshape(values_OI.shape)


def _torch(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Some rows at a time."""
    if scale is None and grid.strategy == "tensor":
        low, high = torch.aminmax(weight_OI)
        scale, zero_point = scale_of(low.float().reshape(1).clamp(max=0), high.float().reshape(1).clamp(min=0), grid)
    codes = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    scales, zeros = [], []
    for rows in pieces(weight_OI, grid):
        values = weight_OI[rows].float()
        mine = slice(None) if grid.strategy == "tensor" else rows
        if scale is None:
            chosen, zero = scale_of(*range_of(values, grid), grid)
            scales.append(chosen)
            zeros.append(zero)
        else:
            chosen, zero = scale[mine], zero_point if zero_point is None else zero_point[mine]
        codes[rows] = _codes(values, chosen, zero, grid)
    if scale is not None:
        return codes, scale, zero_point
    return codes, torch.cat(scales), None if grid.symmetric else torch.cat([z for z in zeros if z is not None])


def _triton(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    from .triton.integer_groups import quantize_groups

    return quantize_groups(weight_OI, grid, scale, zero_point)


def on_gpu(weight_OI: Tensor, grid: Grid, *_: object) -> tuple[bool, str]:
    """Whether a GPU program holds what shares a scale; (ok, why not)."""
    held = grid.strategy in ("group", "channel") and (grid.group_size or weight_OI.shape[1]) <= LARGEST_GROUP
    return weight_OI.is_cuda and held, f"groups or channels of at most {LARGEST_GROUP} weights on a GPU"


QUANTIZE_GROUPS = Kernel("quant.quantize_groups", reference, (Implementation("triton", _triton, on_gpu, triton_runs), Implementation("torch", _torch)))
