"""The kernels of `kernels/delta_sums.py` in one pass over the weights: a program holds a strip of a tile in registers."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import FORMATS, e2m1_index, e4m3_byte, e4m3_value, nearest, power_below, whole

if TYPE_CHECKING:
    from ..delta_sums import Scales, Sums

# weights a program holds at once
STRIP = 2048
# a product joined to a difference is not rounded, and d' not 0 where a weight is stored as the base's
EXACT = {"enable_fp_fusion": False}


@triton.jit
def _quotient(a, s, inverse):
    """a / s rounded to nearest, from 1 / s rounded to nearest: an estimate and what it leaves (Markstein)."""
    q = a * inverse
    return tl.fma(tl.fma(-q, s, a), inverse, q)


@triton.jit
def _strip(tiles, width, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Of a program: its tiles, which of them there are; where its weights lie, which of them there are."""
    t = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    some = t < tiles
    return t, some, t[:, None] * width + n[None, :], some[:, None] & (n < width)[None, :]


@triton.jit
def _step(scale, at, some, global_scale, NESTED: tl.constexpr):
    """What element values are multiplied by."""
    if NESTED:
        return e4m3_value(tl.load(scale + at, some, 56).to(tl.int32)) * tl.load(global_scale)
    else:
        return tl.load(scale + at, some, 1.0).to(tl.float32)


@triton.jit
def _level(
    w, d, s, zero, pull, half, LEAST: tl.constexpr, MOST: tl.constexpr, PART: tl.constexpr, LARGEST: tl.constexpr, ZERO: tl.constexpr, PULL: tl.constexpr
):
    """Element values, as `round_pulled` in `kernels/delta_sums.py`."""
    inverse = tl.div_rn(1.0, s)
    x = _quotient(w, s, inverse)
    if LARGEST > 0:
        if PULL:
            power = power_below(x, LEAST, MOST)
            near = power * (PART * 0.4999)
            target = x + tl.minimum(tl.maximum(_quotient(d * pull, s, inverse), -near), near)
            inner = power * (1.0 - PART * 0.2499)
            x = tl.where((tl.abs(x) >= power) & (tl.abs(target) < inner), tl.where(x < 0.0, -inner, inner), target)
        size = nearest(tl.abs(x), LEAST, MOST, PART, LARGEST)
        return tl.where(x < 0.0, -size, size)
    else:
        if PULL:
            x += tl.minimum(tl.maximum(_quotient(d * pull, s, inverse), -0.4999), 0.4999)
        level = whole(tl.minimum(tl.maximum(x, -1024.0), 1024.0))
        if ZERO:
            level += zero
        return tl.minimum(tl.maximum(level, -half), half - 1.0)


@triton.jit
def _sums(
    weight, base, scale, zero, global_scale, pull, found, tiles, width, candidates, row, threshold, half,
    LEAST: tl.constexpr, MOST: tl.constexpr, PART: tl.constexpr, LARGEST: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr, PULL: tl.constexpr,
    TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t, some, at, inside = _strip(tiles, width, TILES, WIDTH)
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)  # what lies outside is 0 throughout, and adds nothing
    b = tl.load(base + at, inside, 0.0).to(tl.float32)
    d = w - b
    moved = tl.abs(d) > threshold
    places = tl.num_programs(1).to(tl.int64) * tiles
    place = found + tl.program_id(1).to(tl.int64) * tiles + t
    tl.store(place, tl.sum(moved.to(tl.float32), 1), some)
    tl.store(place + places, tl.sum(d * d, 1), some)
    place += 2 * places
    for c in range(candidates):
        s = _step(scale, t, some, global_scale, NESTED)[:, None]
        offset = tl.load(zero + t, some, 0).to(tl.float32)[:, None] if ZERO else 0.0
        level = _level(w, d, s, offset, tl.load(pull + c) if PULL else 0.0, half, LEAST, MOST, PART, LARGEST, ZERO, PULL)
        value = (level - offset) * s if ZERO else level * s
        f = value - b
        error = value - w
        dot = d * f
        same = (dot > 0.0) & moved
        tl.store(place, tl.sum(same.to(tl.float32), 1), some)
        tl.store(place + places, tl.sum(dot, 1), some)
        tl.store(place + 2 * places, tl.sum(f * f, 1), some)
        tl.store(place + 3 * places, tl.sum(error * error, 1), some)
        scale += row
        zero += row
        place += 4 * places


@triton.jit
def _codes(
    weight, base, scale, zero, global_scale, pull, codes, tiles, width, half,
    LEAST: tl.constexpr, MOST: tl.constexpr, PART: tl.constexpr, LARGEST: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr, PULL: tl.constexpr,
    TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t, some, at, inside = _strip(tiles, width, TILES, WIDTH)
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)
    d = w - tl.load(base + at, inside, 0.0).to(tl.float32) if PULL else w
    s = _step(scale, t, some, global_scale, NESTED)[:, None]
    offset = tl.load(zero + t, some, 0).to(tl.float32)[:, None] if ZERO else 0.0
    drawn = tl.load(pull + t, some, 0.0)[:, None] if PULL else 0.0
    level = _level(w, d, s, offset, drawn, half, LEAST, MOST, PART, LARGEST, ZERO, PULL)
    if LARGEST == 448.0:
        code = e4m3_byte(tl.abs(level)) | ((level.to(tl.int32, bitcast=True) >> 24) & 0x80)
    elif LARGEST == 6.0:
        code = e2m1_index(tl.abs(level)) | tl.where(level < 0.0, 8, 0)
    else:
        code = level.to(tl.int32)
    tl.store(codes + at, code.to(codes.dtype.element_ty), inside)


def _sizes(tiles: int, width: int) -> tuple[int, int]:
    """Tiles and weights of each that a program holds."""
    wide = min(STRIP, triton.next_power_of_2(width))
    return max(1, min(STRIP // wide, triton.next_power_of_2(tiles))), wide


def _stored(scales: "Scales") -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Scales, zero points and global scale as kernels take them, or something in their place; what kind of them there is."""
    scale = scales.scale_CT if scales.global_scale is None else scales.scale_CT.view(torch.uint8)
    zero = scale if scales.zero_CT is None else scales.zero_CT
    assert scale.shape[1] == 1 or (scale.stride(1) == 1 and scale.stride() == zero.stride())
    least, most, part, largest = FORMATS[scales.elements]
    kind = {"LEAST": least, "MOST": most, "PART": part, "LARGEST": largest, "NESTED": scales.global_scale is not None, "ZERO": scales.zero_CT is not None}
    return scale, zero, scale if scales.global_scale is None else scales.global_scale, kind


def delta_sums(weight_TN: Tensor, base_TN: Tensor, scales: "Scales", pulls: Sequence[float], threshold: float) -> "Sums":
    """As the reference."""
    from ..delta_sums import Sums

    tiles, width = weight_TN.shape
    high, wide = _sizes(tiles, width)
    strips, count = triton.cdiv(width, wide), len(scales.scale_CT)
    found = torch.empty(2 + 4 * count, strips, tiles, device=weight_TN.device)
    scale, zero, global_scale, kind = _stored(scales)
    pull = torch.tensor([*pulls], device=weight_TN.device) if any(pulls) else found
    _sums[(triton.cdiv(tiles, high), strips)](
        weight_TN.contiguous(), base_TN.contiguous(), scale, zero, global_scale, pull, found, tiles, width, count, scale.stride(0), threshold,
        float(scales.half), **kind, PULL=any(pulls), TILES=high, WIDTH=wide, num_warps=4, **EXACT,
    )  # fmt: skip
    sums = found[:, 0] if strips == 1 else found.sum(1)
    return Sums(sums[2:].unflatten(0, (count, 4)), sums[:2])


def codes(weight_TN: Tensor, base_TN: Tensor | None, scales: "Scales", pull_T: Tensor | None) -> Tensor:
    """As the reference."""
    tiles, width = weight_TN.shape
    high, wide = _sizes(tiles, width)
    found = torch.empty(tiles, width, dtype=torch.int8 if scales.elements == "int" else torch.uint8, device=weight_TN.device)
    weight = weight_TN.contiguous()
    pulled = base_TN is not None and pull_T is not None
    scale, zero, global_scale, kind = _stored(scales)
    _codes[(triton.cdiv(tiles, high), triton.cdiv(width, wide))](
        weight, weight if base_TN is None else base_TN.contiguous(), scale, zero, global_scale, scale if pull_T is None else pull_T, found, tiles, width,
        float(scales.half), **kind, PULL=pulled, TILES=high, WIDTH=wide, num_warps=4, **EXACT,
    )  # fmt: skip
    return found.view(torch.float8_e4m3fn) if scales.elements == "e4m3" else found
