"""`round_ternary` and its way back as one program for some groups: thresholds, scales and sums stay in registers."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
import torch
import triton
import triton.language as tl
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid

from ..round_ternary import Rule, least_scale
from .rounding import divided, narrowed

# weights a program, at least one group
WEIGHTS = 2048
_STORED = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _kernel(
    weight, slopes, pulls, found, scales, sums, groups, per_row, share,
    PART: tl.constexpr, OF_KEPT: tl.constexpr, APART: tl.constexpr, STORED: tl.constexpr, LEAST: tl.constexpr, GIVEN: tl.constexpr, CODES: tl.constexpr,
    BACK: tl.constexpr, PULLS: tl.constexpr, WITH_SCALE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = first + tl.arange(0, GROUPS)
    some = group < groups
    j = tl.arange(0, WIDTH)
    inside = some[:, None] & (j < SIZE)[None, :]
    place = tl.arange(0, GROUPS)[:, None] * SIZE + j[None, :]
    w = tl.load(weight + first * SIZE + place, inside, 0.0).to(tl.float32)
    size = tl.abs(w)
    mean = divided(tl.sum(size, 1), SIZE * 1.0)
    if APART > 0:
        lane = ((j // APART) % 4)[None, :]
        kept = size < 0
        for other in tl.static_range(4):  # a weight is kept if another is smaller, or as small and before it
            beside = tl.abs(tl.load(weight + first * SIZE + place + (other - lane) * APART, inside, 0.0).to(tl.float32))
            kept = kept | (beside < size) | ((beside == size) & (other < lane))
    else:
        kept = size > (mean * PART)[:, None]
    kept = kept & inside
    code = tl.where(kept, tl.where(w < 0, -1.0, 1.0), 0.0)
    if BACK:
        slope = tl.load(slopes + first * SIZE + place, inside, 0.0).to(tl.float32)
        back = slope * (1.0 + share)
        if PULLS:
            pull = tl.load(pulls + group // per_row, some, 0.0)
            back += tl.where(kept, 0.0, pull[:, None])
        tl.store(found + first * SIZE + place, narrowed(back, found.dtype.element_ty).to(found.dtype.element_ty), inside)
        if WITH_SCALE:
            tl.store(scales + group, tl.sum(code * slope, 1), some)
    else:
        if GIVEN:
            scale = tl.load(scales + group, some, 1.0)
        else:
            scale = mean
            if OF_KEPT:
                count = tl.sum(tl.where(kept, 1.0, 0.0), 1)
                scale = tl.div_rn(tl.sum(tl.where(kept, size, 0.0), 1), tl.maximum(count, 1.0))
            scale = narrowed(tl.maximum(scale, LEAST), STORED)
            tl.store(scales + group, scale, some)
        tl.store(sums + group, tl.sum(tl.where(kept, 0.0, w), 1), some)
        if CODES:
            tl.store(found + first * SIZE + place, code.to(tl.int8), inside)
        else:
            value = code * scale[:, None] + share * w
            tl.store(found + first * SIZE + place, narrowed(value, found.dtype.element_ty).to(found.dtype.element_ty), inside)


def _run(
    weight_OI: Tensor,
    grid: Grid,
    rule: Rule,
    slope_OI: Tensor | None,
    pull_O: Tensor | None,
    scale_OG: Tensor | None,
    share: float,
    as_codes: bool,
    with_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, device = weight_OI.shape[1], weight_OI.device
    size, dtype = grid.group_size or inputs, torch_dtype(grid.scale_dtype)
    weight_OI = weight_OI.contiguous()
    found = torch.empty_like(weight_OI, dtype=torch.int8 if as_codes else weight_OI.dtype)
    scale = torch.empty(grid.scale_shape((weight_OI.shape[0], inputs)), device=device) if scale_OG is None else scale_OG.contiguous()
    sums = torch.empty_like(scale)
    width = triton.next_power_of_2(size)
    groups_a_program = max(1, WEIGHTS // width)
    _kernel[(triton.cdiv(scale.numel(), groups_a_program),)](
        weight_OI, weight_OI if slope_OI is None else slope_OI.contiguous(), scale if pull_O is None else pull_O.contiguous(),
        found, scale, sums, scale.numel(), inputs // size, float(share),
        PART=rule.part, OF_KEPT=rule.of_kept, APART=rule.apart, STORED=_STORED[dtype], LEAST=least_scale(dtype), GIVEN=scale_OG is not None, CODES=as_codes,
        BACK=slope_OI is not None, PULLS=pull_O is not None, WITH_SCALE=with_scale,
        SIZE=size, WIDTH=width, GROUPS=groups_a_program, num_warps=min(16, max(4, width // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return found, scale, sums


def round_ternary(weight_OI: Tensor, grid: Grid, rule: Rule, scale_OG: Tensor | None, share: float, as_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; sums are of another order."""
    return _run(weight_OI, grid, rule, None, None, scale_OG, share, as_codes, False)


def round_ternary_back(
    slope_OI: Tensor, weight_OI: Tensor, grid: Grid, rule: Rule, pull_O: Tensor | None, share: float, with_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """As the reference; sums are of another order."""
    found, scale, _ = _run(weight_OI, grid, rule, slope_OI, pull_O, None, share, False, with_scale)
    return found, scale if with_scale else None
