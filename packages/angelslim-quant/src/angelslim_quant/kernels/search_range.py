"""Ranges of integers: of several shrunk ones of each group the one of least error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.schemes import Grid, against, pieces

from .amax import grouped
from .quantize_groups import on_gpu, range_of, scale_of


def reference(weight_OI: Tensor, grid: Grid, importance_I: Tensor, shrinks: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for the shrunk range of least error, the first on a tie, per whatever shares a scale.

    The error is sum_i importance_i (w_i - q_i)^2; the unshrunk range is always a candidate.

    Args:
        weight_OI: any float dtype, finite.
        grid: integer, strategy "tensor", "channel" or "group".
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
        found = (values / scales).round_()
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


def _torch(weight_OI: Tensor, grid: Grid, importance_I: Tensor, shrinks: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """Some rows at a time, in memory that is used again."""
    if grid.strategy == "tensor":  # one scale needs all rows; no pass of ours asks for it
        return reference(weight_OI, grid, importance_I, shrinks)
    outputs, inputs = weight_OI.shape
    shape, size, half = grid.scale_shape((outputs, inputs)), grid.group_size or inputs, 1 << (grid.bits - 1)
    best_scale = torch.empty(shape, dtype=torch_dtype(grid.scale_dtype), device=weight_OI.device)
    best_zero = None if grid.symmetric else torch.empty(shape, dtype=torch.int8, device=weight_OI.device)
    weights = importance_I.float().view(1, -1, size)
    scratch = None
    for rows in pieces(weight_OI, grid):
        values = weight_OI[rows].float().view(-1, inputs // size, size)
        negative = -values
        if scratch is None or scratch.shape != values.shape:
            scratch = torch.empty_like(values)
        low, high = values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)
        best = None
        for shrink in (1.0, *shrinks):
            scale, zero = scale_of(low * shrink, high * shrink, grid)
            step = scale.float()[..., None]
            torch.div(values, step, out=scratch).round_()
            if zero is None:
                scratch.clamp_(-half, half - 1)
            else:
                offset = zero.float()[..., None]
                scratch.add_(offset).clamp_(-half, half - 1).sub_(offset)
            error = torch.addcmul(negative, scratch, step, out=scratch).square_().mul_(weights).sum(-1)
            if best is None:
                best, chosen, chosen_zero = error, scale, zero
                continue
            better = error < best
            best = torch.minimum(best, error)
            chosen = torch.where(better, scale, chosen)
            if zero is not None and chosen_zero is not None:
                chosen_zero = torch.where(better, zero, chosen_zero)
        best_scale[rows] = chosen
        if best_zero is not None and chosen_zero is not None:
            best_zero[rows] = chosen_zero
    return best_scale, best_zero


def _triton(weight_OI: Tensor, grid: Grid, importance_I: Tensor, shrinks: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    from .triton.integer_groups import search_range

    return search_range(weight_OI, grid, importance_I, shrinks)


SEARCH_RANGE = Kernel("quant.search_range", reference, (Implementation("triton", _triton, on_gpu, triton_runs), Implementation("torch", _torch)))
