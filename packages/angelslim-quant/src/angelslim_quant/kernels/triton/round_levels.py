"""`round_levels` and its way back as one program for some groups: each weight is read once, a scale's gradient is summed in registers."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
import torch
import triton
import triton.language as tl
from torch import Tensor

from angelslim_core.schemes import Grid

from ..round_levels import Levels
from .rounding import narrowed, whole

# weights a program, at least one group
WEIGHTS = 2048


@triton.jit
def _kernel(
    weight, scales, zeros, slopes, found, scale_slopes, groups, LOW, HIGH,
    STEP: tl.constexpr, SHIFT: tl.constexpr, HAS_ZERO: tl.constexpr, BACK: tl.constexpr, WITH_WEIGHT: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = first + tl.arange(0, GROUPS)
    some = group < groups
    j = tl.arange(0, WIDTH)
    inside = some[:, None] & (j < SIZE)[None, :]
    place = tl.arange(0, GROUPS)[:, None] * SIZE + j[None, :]
    w = tl.load(weight + first * SIZE + place, inside, 0.0).to(tl.float32)
    scale = tl.load(scales + group, some, 1.0)[:, None] + tl.zeros_like(w)
    low = tl.zeros_like(w) + LOW
    high = tl.zeros_like(w) + HIGH
    if HAS_ZERO:
        zero = tl.load(zeros + group, some, 0.0)[:, None]
        low -= zero
        high -= zero
    ratio = tl.div_rn(w, scale)
    code = tl.minimum(tl.maximum(ratio, low), high)
    if STEP == 1:
        code = whole(code)
    else:
        code = whole((code - SHIFT) * (1.0 / STEP)) * STEP + SHIFT
    if BACK:
        slope = tl.load(slopes + first * SIZE + place, inside, 0.0)
        kept = (ratio >= low) & (ratio <= high)
        if WITH_WEIGHT:
            tl.store(found + first * SIZE + place, tl.where(kept, slope, 0.0).to(found.dtype.element_ty), inside)
        part = (code - tl.where(kept, ratio, 0.0)) * slope.to(tl.float32)
        tl.store(scale_slopes + group, tl.sum(part, 1), some)
    else:
        tl.store(found + first * SIZE + place, narrowed(code * scale, found.dtype.element_ty).to(found.dtype.element_ty), inside)


def _run(
    slope_OI: Tensor | None, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels, with_weight: bool
) -> tuple[Tensor, Tensor]:
    inputs, back = weight_OI.shape[1], slope_OI is not None
    size = grid.group_size or inputs
    weight_OI, scale_OG = weight_OI.contiguous(), scale_OG.contiguous()
    found = torch.empty_like(weight_OI) if with_weight else weight_OI
    scale_slope = torch.empty_like(scale_OG) if back else scale_OG
    width = triton.next_power_of_2(size)
    groups_a_program = max(1, WEIGHTS // width)
    _kernel[(triton.cdiv(scale_OG.numel(), groups_a_program),)](
        weight_OI, scale_OG, scale_OG if zero_OG is None else zero_OG.contiguous(), weight_OI if slope_OI is None else slope_OI.contiguous(),
        found, scale_slope, scale_OG.numel(), float(levels.low), float(levels.high),
        STEP=levels.step, SHIFT=levels.shift, HAS_ZERO=zero_OG is not None, BACK=back, WITH_WEIGHT=with_weight,
        SIZE=size, WIDTH=width, GROUPS=groups_a_program, num_warps=min(16, max(4, width // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return found, scale_slope


def round_levels(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels) -> Tensor:
    """As the reference; steps are powers of two."""
    return _run(None, weight_OI, scale_OG, zero_OG, grid, levels, True)[0]


def round_levels_back(
    slope_OI: Tensor, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels, with_weight: bool
) -> tuple[Tensor | None, Tensor]:
    """As the reference; sums are of another order."""
    found, scale_slope = _run(slope_OI, weight_OI, scale_OG, zero_OG, grid, levels, with_weight)
    return found if with_weight else None, scale_slope
