"""The kernels of `kernels/delta_choice.py`: a program holds some tiles and goes through their candidates."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype

from .delta_sums import EXACT
from .integer_groups import integer_scale
from .rounding import divided, e4m3_byte, narrowed, nearest

if TYPE_CHECKING:
    from ..delta_choice import Around, Choice, Metric, Span
    from ..delta_sums import Scales, Sums

# tiles a program
TILES = 128


@triton.jit
def _scales(
    low, high, points, center, global_scale, ratios, scales, zeros, tiles, candidates, row, column, near, lowest, highest,
    HALF: tl.constexpr, SYMMETRIC: tl.constexpr, NESTED: tl.constexpr, AROUND: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    some = t < tiles
    least = tl.minimum(tl.load(low + t, some, 0.0).to(tl.float32), 0.0)
    most = tl.maximum(tl.load(high + t, some, 0.0).to(tl.float32), 0.0)
    amax = tl.maximum(-least, most)
    if NESTED:
        absmax = divided(divided(amax, 6.0), tl.load(global_scale))
    elif HALF == 0:
        absmax = narrowed(divided(amax, 448.0), scales.dtype.element_ty)
        absmax = tl.where(absmax > 0.0, absmax, 1.0)
    if AROUND:
        middle = tl.load(center + t, some, 1.0)
        first = tl.maximum(middle - near, lowest)
        way = tl.minimum(middle + near, highest) - first
    place = t
    for c in range(candidates):
        ratio = tl.load(points + c * row + t * column, some, 1.0)
        if AROUND:
            ratio = first + way * ratio
            tl.store(ratios + place, ratio, some)
        if HALF > 0:
            scale, zero = integer_scale(least * ratio, most * ratio, scales, HALF, SYMMETRIC)
            if not SYMMETRIC:
                tl.store(zeros + place, zero.to(tl.int8), some)
        elif NESTED:
            byte = tl.maximum(e4m3_byte(nearest(absmax * ratio, 0.015625, 256.0, 0.125, 448.0)), 1)
            scale = tl.where(amax > 0.0, byte, 56)
        else:
            scale = narrowed(absmax * ratio, scales.dtype.element_ty)
        tl.store(scales + place, scale.to(scales.dtype.element_ty), some)
        place += tiles


@triton.jit
def _signs(at, some, changed):
    return tl.div_rn(tl.load(at, some, 0.0), tl.maximum(changed, 1.0))


@triton.jit
def _cosine(at, tiles, some, learned):
    size = tl.maximum(tl.sqrt_rn(learned), 1e-10) * tl.maximum(tl.sqrt_rn(tl.load(at + 2 * tiles, some, 0.0)), 1e-10)
    return tl.div_rn(tl.load(at + tiles, some, 0.0), size)


@triton.jit
def _score(at, tiles, some, changed, learned, SIGNS: tl.constexpr, COSINE: tl.constexpr):
    """Of candidates whose sums begin at `at`: score, rate of preserved signs, cosine."""
    signs = _signs(at, some, changed) if SIGNS else changed
    angle = _cosine(at, tiles, some, learned) if COSINE else changed
    if SIGNS and COSINE:
        score = (signs + angle) * 0.5
    elif SIGNS:
        score = signs
    elif COSINE:
        score = angle
    else:
        score = -tl.load(at + 3 * tiles, some, 0.0)
    return score, signs, angle


@triton.jit
def _choose(
    ratio, sums, own, before_ratio, before_sums, found_ratio, found, tiles, candidates, row, column, summing,
    SIGNS: tl.constexpr, COSINE: tl.constexpr, BEFORE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    some = t < tiles
    changed = tl.load(own + t, some, 0.0)
    learned = tl.load(own + tiles + t, some, 0.0)
    place = sums + t
    first = before_sums + t if BEFORE else place
    score, signs, angle = _score(first, tiles, some, changed, learned, SIGNS, COSINE)
    limit = score + tl.abs(score) * summing
    if BEFORE:
        at = first + 4 * tiles
        first_ratio = tl.full((TILES,), 1.0, tl.float32)
        chosen = tl.load(before_ratio + t, some, 1.0)
        best, _, _ = _score(at, tiles, some, changed, learned, SIGNS, COSINE)
    else:
        at = first
        first_ratio = tl.load(ratio + t * column, some, 1.0)
        chosen = first_ratio
        best = score
    for c in range(candidates):
        new, new_signs, new_angle = _score(place, tiles, some, changed, learned, SIGNS, COSINE)
        better = new > best
        if SIGNS and COSINE:
            better = better & (new_signs >= signs) & (new_angle >= angle)
        best = tl.where(better, new, best)
        at = tl.where(better, place, at)
        chosen = tl.where(better, tl.load(ratio + c * row + t * column, some, 1.0), chosen)
        place += 4 * tiles
    kept = best > limit
    at = tl.where(kept, at, first)
    tl.store(found_ratio + t, tl.where(kept, chosen, first_ratio), some)
    for k in tl.static_range(4):
        tl.store(found + k * tiles + t, tl.load(first + k * tiles, some, 0.0), some)
        tl.store(found + (4 + k) * tiles + t, tl.load(at + k * tiles, some, 0.0), some)


@triton.jit
def _totals(
    sums, own, ratio, pull, parts, tiles, lowest, reach,
    PULL: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    some = t < tiles
    changed = tl.load(own + t, some, 0.0)
    learned = tl.load(own + tiles + t, some, 0.0)
    has = changed > 0.0
    out = parts + tl.program_id(0) * (17 + BINS)
    for side in tl.static_range(2):
        at = sums + 4 * side * tiles + t
        tl.store(out + 6 * side, tl.sum(tl.where(has, _signs(at, some, changed), 0.0).to(tl.float64)))
        tl.store(out + 6 * side + 1, tl.sum(tl.where(has, _cosine(at, tiles, some, learned), 0.0).to(tl.float64)))
        tl.store(out + 6 * side + 2, tl.sum(tl.load(at + 3 * tiles, some, 0.0).to(tl.float64)))
        for k in tl.static_range(3):
            tl.store(out + 6 * side + 3 + k, tl.sum(tl.load(at + k * tiles, some, 0.0).to(tl.float64)))
    chosen = tl.load(ratio + t, some, 1.0)
    moved = chosen != 1.0
    if PULL:
        moved = moved | (tl.load(pull + t, some, 0.0) != 0.0)
    lost = tl.load(sums + 6 * tiles + t, some, 0.0) == 0.0
    tl.store(out + 12, tl.sum(changed.to(tl.float64)))
    tl.store(out + 13, tl.sum(has.to(tl.float64)))
    tl.store(out + 14, tl.sum((has & moved).to(tl.float64)))
    tl.store(out + 15, tl.sum((has & lost).to(tl.float64)))
    tl.store(out + 16, tl.sum(learned.to(tl.float64)))
    place = (tl.div_rn(chosen - lowest, tl.zeros_like(chosen) + reach) * BINS).to(tl.int32)
    place = tl.minimum(tl.maximum(place, 0), BINS - 1)
    bins = tl.arange(0, BINS)
    tl.store(out + 17 + bins, tl.sum(((place[:, None] == bins[None, :]) & has[:, None]).to(tl.int32), 0).to(tl.float64))


def scales(span: "Span", points_CT: Tensor, around: "Around | None") -> "tuple[Tensor, Scales]":
    """As the reference."""
    from ..delta_sums import Scales

    grid, low_T = span.grid, span.low_T
    count, tiles = points_CT.shape
    nested = span.global_scale is not None
    found = torch.empty(count, tiles, dtype=torch.uint8 if nested else torch_dtype(grid.scale_dtype), device=low_T.device)
    zero = torch.empty(count, tiles, dtype=torch.int8, device=low_T.device) if grid.type == "int" and not grid.symmetric else None
    ratio = points_CT if around is None else torch.empty(count, tiles, device=low_T.device)
    center, near, lowest, highest = (low_T, 0.0, 0.0, 0.0) if around is None else around
    _scales[(triton.cdiv(tiles, TILES),)](
        low_T, span.high_T, points_CT, center, low_T if span.global_scale is None else span.global_scale, ratio, found, found if zero is None else zero,
        tiles, count, *points_CT.stride(), near, lowest, highest,
        HALF=1 << (grid.bits - 1) if grid.type == "int" else 0, SYMMETRIC=zero is None, NESTED=nested, AROUND=around is not None, TILES=TILES,
        num_warps=4, **EXACT,
    )  # fmt: skip
    return ratio, Scales(found.view(torch.float8_e4m3fn) if nested else found, zero, grid, span.global_scale)


def choose(ratio_CT: Tensor, sums: "Sums", metric: "Metric", before: "Choice | None") -> "Choice":
    """As the reference."""
    from ..delta_choice import SUMMING, Choice
    from ..delta_sums import Sums

    count, tiles = ratio_CT.shape
    ratio, found = torch.empty(tiles, device=ratio_CT.device), torch.empty(2, 4, tiles, device=ratio_CT.device)
    tried, own = sums.tried_C4T.contiguous(), sums.own_2T.contiguous()
    earlier = (ratio, found) if before is None else (before.ratio_T, before.sums.tried_C4T)
    _choose[(triton.cdiv(tiles, TILES),)](
        ratio_CT, tried, own, *earlier, ratio, found, tiles, count, *ratio_CT.stride(), SUMMING,
        SIGNS=metric in ("sign", "joint"), COSINE=metric in ("cosine", "joint"), BEFORE=before is not None, TILES=TILES, num_warps=4, **EXACT,
    )  # fmt: skip
    return Choice(ratio, Sums(found, own))


def totals(choice: "Choice", pull_T: Tensor | None, lowest: float, highest: float) -> Tensor:
    """As the reference."""
    from ..delta_choice import BINS

    tiles = len(choice.ratio_T)
    size = min(1024, triton.next_power_of_2(tiles))
    parts = torch.empty(triton.cdiv(tiles, size), 17 + BINS, dtype=torch.float64, device=choice.ratio_T.device)
    _totals[(len(parts),)](
        choice.sums.tried_C4T, choice.sums.own_2T, choice.ratio_T, choice.ratio_T if pull_T is None else pull_T, parts, tiles, lowest, highest - lowest,
        PULL=pull_T is not None, BINS=BINS, TILES=size, num_warps=4, **EXACT,
    )  # fmt: skip
    return parts[0] if len(parts) == 1 else parts.sum(0)
