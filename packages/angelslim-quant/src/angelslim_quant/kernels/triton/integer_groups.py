"""`quantize_groups` and `search_range` as one program for some groups: they are read once and stay in registers."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid

from .rounding import divided, narrowed, whole

# weights a program, at least one group
WEIGHTS = 2048


@triton.jit
def integer_scale(low, high, scales, HALF: tl.constexpr, SYMMETRIC: tl.constexpr):
    """fp32 of the scale as it is stored, and the zero point (0 if symmetric)."""
    if SYMMETRIC:
        exact = tl.maximum(divided(-low, HALF * 1.0), divided(high, HALF - 1.0))
    else:
        exact = divided(high - low, 2.0 * HALF - 1.0)
    scale = narrowed(exact, scales.dtype.element_ty)
    scale = tl.where(scale > 0, scale, 1.0)
    if SYMMETRIC:
        zero = tl.zeros_like(scale)
    else:
        zero = tl.minimum(tl.maximum(whole(-HALF - tl.div_rn(low, scale)), -HALF * 1.0), HALF - 1.0)
    return scale, zero


@triton.jit
def _levels(w, scale, zero, HALF: tl.constexpr):
    """Codes as fp32; what lies beyond 2^10 would be cut off however far."""
    x = whole(tl.minimum(tl.maximum(tl.div_rn(w, scale), -1024.0), 1024.0))
    return tl.minimum(tl.maximum(x + zero, -HALF * 1.0), HALF - 1.0)


@triton.jit
def _kernel(
    weight, importance, shrinks, codes, scales, zeros, groups, per_row, count,
    HALF: tl.constexpr, SYMMETRIC: tl.constexpr, GIVEN: tl.constexpr, SEARCH: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = first + tl.arange(0, GROUPS)
    some = group < groups
    j = tl.arange(0, WIDTH)
    inside = some[:, None] & (j < SIZE)[None, :]
    place = tl.arange(0, GROUPS)[:, None] * SIZE + j[None, :]
    w = tl.load(weight + first * SIZE + place, inside, 0.0).to(tl.float32)
    if GIVEN:
        scale = tl.load(scales + group, some, 1.0).to(tl.float32)
        zero = tl.zeros_like(scale)
        if not SYMMETRIC:
            zero = tl.load(zeros + group, some, 0).to(tl.float32)
    else:
        low = tl.minimum(tl.min(w, 1), 0.0)
        high = tl.maximum(tl.max(w, 1), 0.0)
        scale, zero = integer_scale(low, high, scales, HALF, SYMMETRIC)
    if SEARCH:
        counts = tl.load(importance + (group % per_row).to(tl.int32)[:, None] * SIZE + j[None, :], inside, 0.0)
        step = scale[:, None] + tl.zeros_like(w)
        offset = zero[:, None] + tl.zeros_like(w)
        error = (_levels(w, step, offset, HALF) - offset) * step - w
        best = tl.sum(error * error * counts, 1)
        for n in range(count):
            shrink = tl.load(shrinks + n)
            trial, trial_zero = integer_scale(low * shrink, high * shrink, scales, HALF, SYMMETRIC)
            step = trial[:, None] + tl.zeros_like(w)
            offset = trial_zero[:, None] + tl.zeros_like(w)
            error = (_levels(w, step, offset, HALF) - offset) * step - w
            found = tl.sum(error * error * counts, 1)
            better = found < best
            best = tl.where(better, found, best)
            scale = tl.where(better, trial, scale)
            zero = tl.where(better, trial_zero, zero)
    else:
        level = _levels(w, scale[:, None] + tl.zeros_like(w), zero[:, None] + tl.zeros_like(w), HALF)
        tl.store(codes + first * SIZE + place, level.to(tl.int8), inside)
    if not GIVEN:
        tl.store(scales + group, scale.to(scales.dtype.element_ty), some)
        if not SYMMETRIC:
            tl.store(zeros + group, zero.to(tl.int8), some)


@lru_cache
def _shrinks(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values or (1.0,), device=device)


def _run(
    weight_OI: Tensor, grid: Grid, scale: Tensor | None, zero: Tensor | None, importance_I: Tensor | None, shrinks: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    outputs, inputs = weight_OI.shape
    size, given, device = grid.group_size or inputs, scale is not None, weight_OI.device
    weight_OI = weight_OI.contiguous()
    if scale is None:
        shape = grid.scale_shape((outputs, inputs))
        scale = torch.empty(shape, dtype=torch_dtype(grid.scale_dtype), device=device)
        zero = None if grid.symmetric else torch.empty(shape, dtype=torch.int8, device=device)
    scale, zero = scale.contiguous(), zero if zero is None else zero.contiguous()
    codes = torch.empty(outputs, inputs, dtype=torch.int8, device=device) if importance_I is None else scale
    width = triton.next_power_of_2(size)
    groups_a_program = max(1, WEIGHTS // width)
    _kernel[(triton.cdiv(scale.numel(), groups_a_program),)](
        weight_OI, weight_OI if importance_I is None else importance_I.float().contiguous(), _shrinks(shrinks, device), codes,
        scale, scale if zero is None else zero, scale.numel(), inputs // size, len(shrinks),
        HALF=1 << (grid.bits - 1), SYMMETRIC=zero is None, GIVEN=given, SEARCH=importance_I is not None, SIZE=size, WIDTH=width, GROUPS=groups_a_program,
        num_warps=min(16, max(4, width // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, zero


def quantize_groups(weight_OI: Tensor, grid: Grid, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference."""
    codes, found, zero = _run(weight_OI, grid, scale, zero_point, None, ())
    return (codes, found, zero) if scale is None else (codes, scale, zero_point)


def search_range(weight_OI: Tensor, grid: Grid, importance_I: Tensor, shrinks: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """As the reference."""
    return _run(weight_OI, grid, None, None, importance_I, tuple(shrinks))[1:]
