"""Inputs of a linear as codes: `angelslim_core.emulation.round_input` without multiplying back."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.rounding import E4M3_MAX, cast_e4m3
from angelslim_core.schemes import Grid


def reference(x_NI: Tensor, grid: Grid, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [N, I] (int8 or float8_e4m3fn) and fp32 scales: [N, 1] per token, [N, G] per token and group, or `scale`.

    Args:
        x_NI: rows of an input.
        grid: 8 bits, symmetric; strategy "token", "group" or "tensor".
        scale: [1] fp32, the fixed scale of strategy "tensor", else None.
    """
    values = x_NI.float()
    width, integer = x_NI.shape[1], grid.type == "int"
    largest = 127.0 if integer else E4M3_MAX
    if scale is not None:
        step, found = scale, scale
    elif grid.strategy == "group":
        assert grid.group_size
        values = torch.nn.functional.pad(values, (0, -width % grid.group_size)).unflatten(-1, (-1, grid.group_size))
        step = values.abs().amax(-1, keepdim=True) / largest
        found = step[..., 0]
    else:
        found = step = values.abs().amax(-1, keepdim=True) / largest
    ratio = torch.where(step > 0, values / step, 0).reshape(len(x_NI), -1)[:, :width]
    return ratio.round().clamp_(-128, 127).to(torch.int8) if integer else cast_e4m3(ratio), found


def _triton(x_NI: Tensor, grid: Grid, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from .triton.quantize_rows import quantize_rows

    return quantize_rows(x_NI, grid, scale)


def fits(x_NI: Tensor, grid: Grid, scale: Tensor | None = None) -> tuple[bool, str]:
    """Whether Triton's kernel takes such rows; if not, why."""
    size = grid.group_size or 1
    ok = x_NI.is_cuda and (size & (size - 1) == 0 and size >= 16 if grid.strategy == "group" else scale is not None or x_NI.shape[1] <= 32768)
    return ok, "rows up to 32768 wide on a GPU, in groups of a power of two"


QUANTIZE_ROWS = Kernel("quant.quantize_rows", reference, (Implementation("triton", _triton, fits, triton_runs), Implementation("torch", reference)))
