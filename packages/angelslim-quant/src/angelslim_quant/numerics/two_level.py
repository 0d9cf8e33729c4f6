"""Group scales that are FP8 numbers times one scale a channel, as kernels with FP8 inner products hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.rounding import E4M3_MAX, cast_e4m3
from angelslim_core.schemes import Grid, dequantize

from .amax import amax_of, grouped
from .integer import quantize, search_range

_TOP = 0x7E  # byte of 448


def two_level_scales(weight_OI: Tensor, grid: Grid, importance_I: Tensor | None, shrinks: Sequence[float]) -> Tensor:
    """Scales [O, G] = E4M3 number * channel scale, in the dtype they are stored in.

    The channel scale keeps four bits, so that a product has eight and BF16 holds it, and the largest group of a channel
    gets 448 of it: the engine, which is given products only, divides the largest by 448 and finds the same two factors.

    Args:
        importance_I: weight of the squared error of each input, 1 if not given.
        shrinks: factors of a group's range to try besides 1.
    """
    importance = weight_OI.new_ones(weight_OI.shape[1], dtype=torch.float32) if importance_I is None else importance_I
    empty = amax_of(weight_OI, grid) == 0
    exact = search_range(weight_OI, replace(grid, scale_dtype="F32"), importance, shrinks)[0].masked_fill_(empty, 0)
    largest = exact.amax(1, keepdim=True)
    mantissa, exponent = torch.frexp(largest / E4M3_MAX)
    channel = torch.ldexp((mantissa * 16).round_() / 16, exponent)
    start = cast_e4m3(exact / channel).view(torch.uint8).int()
    best = chosen = None
    for offset in (0, 1, -1):
        byte = (start + offset).clamp(1, _TOP).masked_fill(empty | (exact == largest), _TOP).to(torch.uint8)
        scale = (byte.view(torch.float8_e4m3fn).float() * channel).to(torch_dtype(grid.scale_dtype))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes, _, _ = quantize(weight_OI, grid, scale)
        error = grouped(dequantize(codes, scale, None, grid).sub_(weight_OI.float()).square_().mul_(importance), grid).sum(-1)
        if best is None or chosen is None:
            best, chosen = error, scale
            continue
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    assert chosen is not None
    return chosen
