"""The kernels of `kernels/delta_sums.py` in one pass over the weights: a program holds a strip of a tile in registers."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import FORMATS, nearest, power_below, whole

if TYPE_CHECKING:
    from ..delta_sums import Candidates, Elements, Sums

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
    weight, base, step, zero, pull, found, own, tiles, width, candidates, threshold, half,
    LEAST: tl.constexpr, MOST: tl.constexpr, PART: tl.constexpr, LARGEST: tl.constexpr, ZERO: tl.constexpr, PULL: tl.constexpr,
    TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t, some, at, inside = _strip(tiles, width, TILES, WIDTH)
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)  # what lies outside is 0 throughout, and adds nothing
    b = tl.load(base + at, inside, 0.0).to(tl.float32)
    d = w - b
    moved = tl.abs(d) > threshold
    strip = tl.program_id(1).to(tl.int64) * tiles + t
    places = tl.num_programs(1).to(tl.int64) * tiles
    tl.store(own + strip, tl.sum(moved.to(tl.float32), 1), some)
    tl.store(own + places + strip, tl.sum(d * d, 1), some)
    row = t
    place = found + strip
    for c in range(candidates):
        s = tl.load(step + row, some, 1.0)[:, None]
        offset = tl.load(zero + row, some, 0.0)[:, None] if ZERO else 0.0
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
        row += tiles
        place += 4 * places


@triton.jit
def _levels(
    weight, base, step, zero, pull, levels, tiles, width, half,
    LEAST: tl.constexpr, MOST: tl.constexpr, PART: tl.constexpr, LARGEST: tl.constexpr, ZERO: tl.constexpr, PULL: tl.constexpr,
    TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t, some, at, inside = _strip(tiles, width, TILES, WIDTH)
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)
    d = w - tl.load(base + at, inside, 0.0).to(tl.float32) if PULL else w
    s = tl.load(step + t, some, 1.0)[:, None]
    offset = tl.load(zero + t, some, 0.0)[:, None] if ZERO else 0.0
    drawn = tl.load(pull + t, some, 0.0)[:, None] if PULL else 0.0
    level = _level(w, d, s, offset, drawn, half, LEAST, MOST, PART, LARGEST, ZERO, PULL)
    tl.store(levels + at, level.to(tl.bfloat16), inside)


def _sizes(tiles: int, width: int) -> tuple[int, int]:
    """Tiles and weights of each that a program holds."""
    wide = min(STRIP, triton.next_power_of_2(width))
    return max(1, min(STRIP // wide, triton.next_power_of_2(tiles))), wide


def delta_sums(weight_TN: Tensor, base_TN: Tensor, candidates: "Candidates", threshold: float) -> "Sums":
    """As the reference."""
    from ..delta_sums import Sums

    tiles, width = weight_TN.shape
    high, wide = _sizes(tiles, width)
    strips, count = triton.cdiv(width, wide), len(candidates.step_CT)
    device = weight_TN.device
    found = torch.empty(count, 4, strips, tiles, device=device)
    own = torch.empty(2, strips, tiles, device=device)
    least, most, part, largest = FORMATS[candidates.elements]
    step = candidates.step_CT.contiguous()
    zero = step if candidates.zero_CT is None else candidates.zero_CT.contiguous()
    pulled = any(candidates.pulls)
    pull = torch.tensor(list(candidates.pulls), device=device) if pulled else step
    _sums[(triton.cdiv(tiles, high), strips)](
        weight_TN.contiguous(), base_TN.contiguous(), step, zero, pull, found, own, tiles, width, count, threshold, float(candidates.half),
        LEAST=least, MOST=most, PART=part, LARGEST=largest, ZERO=candidates.zero_CT is not None, PULL=pulled, TILES=high, WIDTH=wide, num_warps=4, **EXACT,
    )  # fmt: skip
    kept, dot, squares, error = found.sum(2).unbind(1)
    changed, learned = own.sum(1).unbind(0)
    return Sums(kept, dot, squares, error, changed, learned)


def round_pulled(
    weight_TN: Tensor, base_TN: Tensor | None, step_T: Tensor, zero_T: Tensor | None, pull_T: Tensor | None, elements: "Elements", half: int
) -> Tensor:  # fmt: skip
    """As the reference, in BF16, which holds every element value."""
    tiles, width = weight_TN.shape
    high, wide = _sizes(tiles, width)
    levels = torch.empty(tiles, width, dtype=torch.bfloat16, device=weight_TN.device)
    least, most, part, largest = FORMATS[elements]
    weight = weight_TN.contiguous()
    pulled = base_TN is not None and pull_T is not None
    _levels[(triton.cdiv(tiles, high), triton.cdiv(width, wide))](
        weight, base_TN.contiguous() if base_TN is not None else weight, step_T.contiguous(), step_T if zero_T is None else zero_T.contiguous(),
        step_T if pull_T is None else pull_T.contiguous(), levels, tiles, width, float(half),
        LEAST=least, MOST=most, PART=part, LARGEST=largest, ZERO=zero_T is not None, PULL=pulled, TILES=high, WIDTH=wide, num_warps=4, **EXACT,
    )  # fmt: skip
    return levels
