"""`delta_sums` in one pass over the weights: a program holds a strip of a tile in registers and goes through the candidates."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..delta_sums import Candidates, Sums

# x + MAGIC - MAGIC rounds fp32 to the nearest whole number, ties to even, for |x| < 2^22
MAGIC = tl.constexpr(12582912.0)
# floats: least and largest power of two below a value, its steps in parts of that, largest value
FORMATS = {"int": (0.0, 0.0, 0.0, 0.0), "e2m1": (1.0, 4.0, 0.5, 6.0), "e4m3": (2.0**-6, 256.0, 0.125, 448.0)}
# weights a program holds at once
STRIP = 4096


@triton.jit
def _whole(x):
    return (x + MAGIC) - MAGIC


@triton.jit
def _kernel(
    weight, base, step, zero, pull, found, own, tiles, width, candidates, threshold, half,
    LEAST: tl.constexpr, MOST: tl.constexpr, PART: tl.constexpr, LARGEST: tl.constexpr, ZERO: tl.constexpr, PULL: tl.constexpr,
    TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TILES + tl.arange(0, TILES)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    some = t < tiles
    inside = some[:, None] & (n < width)[None, :]
    at = t[:, None].to(tl.int64) * width + n[None, :]
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)
    b = tl.load(base + at, inside, 0.0).to(tl.float32)
    d = w - b
    moved = tl.abs(d) > threshold
    strip = tl.program_id(1).to(tl.int64) * tiles + t
    places = tl.num_programs(1).to(tl.int64) * tiles
    tl.store(own + strip, tl.sum(moved.to(tl.float32), 1), some)
    tl.store(own + places + strip, tl.sum(d * d, 1), some)
    for c in range(candidates):
        s = tl.load(step + c * tiles.to(tl.int64) + t, some, 1.0)[:, None]
        x = tl.div_rn(w, tl.broadcast_to(s, (TILES, WIDTH)))
        if LARGEST > 0:
            if PULL:
                power = (tl.abs(x).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                power = tl.minimum(tl.maximum(power, LEAST), MOST)
                near = power * (PART * 0.4999)
                shift = tl.div_rn(d * tl.load(pull + c), tl.broadcast_to(s, (TILES, WIDTH)))
                target = x + tl.minimum(tl.maximum(shift, -near), near)
                inner = power * (1.0 - PART * 0.2499)
                x = tl.where((tl.abs(x) >= power) & (tl.abs(target) < inner), tl.where(x < 0.0, -inner, inner), target)
            size = tl.minimum(tl.abs(x), LARGEST)
            power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            unit = tl.minimum(tl.maximum(power, LEAST), MOST) * PART
            size = _whole(size / unit) * unit
            value = tl.where(x < 0.0, -size, size) * s
        else:
            if PULL:
                shift = tl.div_rn(d * tl.load(pull + c), tl.broadcast_to(s, (TILES, WIDTH)))
                x += tl.minimum(tl.maximum(shift, -0.4999), 0.4999)
            level = _whole(tl.minimum(tl.maximum(x, -1024.0), 1024.0))
            if ZERO:
                offset = tl.load(zero + c * tiles.to(tl.int64) + t, some, 0.0)[:, None]
                value = (tl.minimum(tl.maximum(level + offset, -half), half - 1.0) - offset) * s
            else:
                value = tl.minimum(tl.maximum(level, -half), half - 1.0) * s
        f = tl.where(inside, value - b, 0.0)
        error = tl.where(inside, value - w, 0.0)
        same = (((f > 0.0) & (d > 0.0)) | ((f < 0.0) & (d < 0.0))) & moved
        place = found + c * 4 * places + strip
        tl.store(place, tl.sum(same.to(tl.float32), 1), some)
        tl.store(place + places, tl.sum(d * f, 1), some)
        tl.store(place + 2 * places, tl.sum(f * f, 1), some)
        tl.store(place + 3 * places, tl.sum(error * error, 1), some)


def delta_sums(weight_TN: Tensor, base_TN: Tensor, candidates: "Candidates", threshold: float) -> "Sums":
    """As the reference."""
    from ..delta_sums import Sums

    tiles, width = weight_TN.shape
    wide = min(STRIP, triton.next_power_of_2(width))
    high = max(1, min(STRIP // wide, triton.next_power_of_2(tiles)))
    strips, count = triton.cdiv(width, wide), len(candidates.step_CT)
    device = weight_TN.device
    found = torch.empty(count, 4, strips, tiles, device=device)
    own = torch.empty(2, strips, tiles, device=device)
    least, most, part, largest = FORMATS[candidates.elements]
    step = candidates.step_CT.contiguous()
    zero = step if candidates.zero_CT is None else candidates.zero_CT.contiguous()
    pulled = any(candidates.pulls)
    pull = torch.tensor(list(candidates.pulls), device=device) if pulled else step
    _kernel[(triton.cdiv(tiles, high), strips)](
        weight_TN.contiguous(), base_TN.contiguous(), step, zero, pull, found, own, tiles, width, count, threshold, float(candidates.half),
        LEAST=least, MOST=most, PART=part, LARGEST=largest, ZERO=candidates.zero_CT is not None, PULL=pulled,
        TILES=high, WIDTH=wide, num_warps=8,
    )  # fmt: skip
    kept, dot, squares, error = found.sum(2).unbind(1)
    changed, learned = own.sum(1).unbind(0)
    return Sums(kept, dot, squares, error, changed, learned)
