"""Rounding to FP8 E4M3FN: absmax / 448, scale and codes of a tensor, channels or blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.rounding import E4M3_MAX, cast_e4m3
from angelslim_core.schemes import Grid, against, pieces

from .amax import amax_of


def scale_of(amax: Tensor, grid: Grid) -> Tensor:
    """amax / 448 in the dtype it is stored in; 1 where amax is 0 or the scale would underflow."""
    amax = amax.float()
    # a tensor on the device: PyTorch multiplies by the inverse of a number on GPUs, which is another result
    scale = (amax / amax.new_full((), E4M3_MAX)).to(torch_dtype(grid.scale_dtype))
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def reference(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn) and scale of a weight.

    Args:
        weight_OI: any float dtype, finite.
        grid: strategy "tensor", "channel" or "block"; blocks at the edges may be smaller.
        scale: use this scale (of `grid.scale_shape`) instead of absmax / 448.
    """
    if scale is None:
        scale = scale_of(amax_of(weight_OI, grid), grid)
    values, scales = against(weight_OI.float(), scale.float(), grid)
    return cast_e4m3(values / scales).reshape(weight_OI.shape), scale


def _torch(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Some rows at a time; absmax of a block's rows before that of its columns."""
    tall, wide = grid.block_structure if grid.strategy == "block" and grid.block_structure else (1, weight_OI.shape[1])
    if scale is None and grid.strategy == "tensor":
        scale = scale_of(amax_of(weight_OI, grid).reshape(1), grid)
    codes = torch.empty(weight_OI.shape, dtype=torch.float8_e4m3fn, device=weight_OI.device)
    scales = []
    for rows in pieces(weight_OI, grid):
        values = weight_OI[rows].float()
        if scale is None:
            chosen = scale_of(_amax(values, tall, wide), grid)
            scales.append(chosen)
        else:
            chosen = scale if grid.strategy == "tensor" else scale[rows.start // tall : -(-rows.stop // tall)]
        step = chosen.float()
        if grid.strategy == "block":
            step = step.repeat_interleave(wide, 1)[:, : values.shape[1]].repeat_interleave(tall, 0)[: values.shape[0]]
        codes[rows] = (values / step).clamp_(-E4M3_MAX, E4M3_MAX)
    return codes, torch.cat(scales) if scale is None else scale


def _amax(values_RI: Tensor, tall: int, wide: int) -> Tensor:
    rows, columns = values_RI.shape
    if rows % tall or columns % wide:
        values_RI = torch.nn.functional.pad(values_RI, (0, -columns % wide, 0, -rows % tall))
    blocks = values_RI.view(-1, tall, values_RI.shape[1])
    peaks = torch.maximum(blocks.amax(1), -blocks.amin(1))
    return peaks.view(peaks.shape[0], -1, wide).amax(-1)


def _triton(weight_OI: Tensor, grid: Grid, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from .triton.quantize_fp8 import quantize_fp8

    if scale is None and grid.strategy == "tensor":
        scale = scale_of(amax_of(weight_OI, grid).reshape(1), grid)
    return quantize_fp8(weight_OI, grid, scale)


def _on_gpu(weight_OI: Tensor, *_: object) -> tuple[bool, str]:
    return weight_OI.is_cuda, "weights on a GPU"


QUANTIZE_FP8 = Kernel("quant.quantize_fp8", reference, (Implementation("triton", _triton, _on_gpu, triton_runs), Implementation("torch", _torch)))
