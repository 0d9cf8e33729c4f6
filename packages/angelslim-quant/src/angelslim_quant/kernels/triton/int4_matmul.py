"""INT4 weights in groups: a vector kernel for few rows, a matrix kernel for more, and one that widens a weight."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..int4_matmul import Packed4

# vector kernel: (outputs, words of all groups of a tile, warps); candidates for tuning, and what is taken, by the number of words in a row
VECTOR_CANDIDATES = [
    (o, w, warps) for o in (1, 2, 4, 8, 16) for w in (64, 128, 256, 512) for warps in (1, 2, 4, 8) if 32 * warps * 2 <= o * w <= 32 * warps * 32
]
VECTOR = {1024: (1, 128, 1), 1 << 30: (1, 256, 2)}
# matrix kernel: (rows, outputs, words, warps, stages), by the number of rows up to which it is taken
MATRIX_CANDIDATES = [
    (16, 32, 16, 4, 4), (16, 64, 16, 4, 4), (16, 64, 32, 4, 3), (16, 128, 16, 4, 3), (32, 64, 16, 4, 4), (32, 64, 32, 4, 3), (32, 128, 16, 4, 3),
    (64, 64, 16, 4, 4), (64, 128, 16, 4, 3), (64, 128, 16, 8, 3), (128, 64, 16, 4, 3), (128, 128, 16, 4, 3), (128, 128, 16, 8, 3), (256, 64, 16, 4, 3), (256, 128, 16, 8, 3),
]  # fmt: skip
MATRIX = {32: (32, 64, 32, 4, 3), 64: (64, 64, 16, 4, 4), 1 << 30: (128, 128, 16, 8, 3)}


@triton.jit
def _vector(
    x, words, scale, zero, x_scale, bias, out, outputs, groups,
    ZERO: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BO: tl.constexpr, BG: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    t = tl.arange(0, T)
    some = o < outputs
    acc = tl.zeros([BO, BG, T], tl.float32)
    for start in range(0, groups, BG):
        g = start + tl.arange(0, BG)
        inside = g < groups
        both = some[:, None] & inside[None, :]
        w = tl.load(words + (o[:, None] * groups + g[None, :])[:, :, None] * T + t[None, None, :], both[:, :, None], 0)
        s = tl.load(scale + o[:, None] * groups + g[None, :], both, 0.0).to(tl.float32)
        at = x + n * groups * (8 * T) + g[:, None] * (8 * T) + t[None, :]
        part = tl.zeros([BO, BG, T], tl.float32)
        total = tl.zeros([BG, T], tl.float32)
        for j in tl.static_range(8):
            v = tl.load(at + j * T, inside[:, None], 0.0).to(tl.float32)
            # a code in the upper bits of an fp32 mantissa whose exponent is that of 16 reads 16 + code
            if j < 5:
                bits = w << (19 - 4 * j)
            else:
                bits = w >> (4 * j - 19)
            part += ((bits & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True) * v[None, :, :]
            total += v
        offset = s * 24.0
        if ZERO:
            offset += s * tl.load(zero + o[:, None] * groups + g[None, :], both, 0.0).to(tl.float32)
        acc += part * s[:, :, None] - total[None, :, :] * offset[:, :, None]
    y = tl.sum(tl.sum(acc, 2), 1)
    if SCALED:
        y *= tl.load(x_scale + n)
    if BIAS:
        y += tl.load(bias + o, some, 0.0).to(tl.float32)
    tl.store(out + n * outputs + o, y.to(out.dtype.element_ty), some)


@triton.jit
def _read(words, scale, zero, o, t, width, groups, both, ZERO: tl.constexpr, T: tl.constexpr):
    """Words [outputs, words] of a tile, their scales, and what is taken from their codes."""
    w = tl.load(words + o[:, None] * width + t[None, :], both, 0)
    place = o[:, None] * groups + (t // T)[None, :]
    s = tl.load(scale + place, both, 0.0).to(tl.float32)
    z = tl.full(s.shape, 8.0, tl.float32)
    if ZERO:
        z += tl.load(zero + place, both, 0.0).to(tl.float32)
    return w, s, z


@triton.jit
def _matrix(
    x, words, scale, zero, x_scale, bias, out, rows, outputs, width, groups,
    ZERO: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BW: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    # the weight is the left factor: codes become operands in registers, and few rows leave no part of a tile idle
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    some, real = o < outputs, n < rows
    dtype = out.dtype.element_ty
    acc = tl.zeros([BO, BN], tl.float32)
    for start in range(0, width, BW):
        t = start + tl.arange(0, BW)
        inside = t < width
        both = some[:, None] & inside[None, :]
        w, s, z = _read(words, scale, zero, o, t, width, groups, both, ZERO, T)
        g = t // T
        at = x + n[None, :].to(tl.int64) * (8 * width) + (g * (8 * T) + t % T)[:, None]
        for j in tl.static_range(8):
            left = ((((w >> (4 * j)) & 15).to(tl.float32) - z) * s).to(dtype)
            right = tl.load(at + j * T, inside[:, None] & real[None, :], 0.0).to(dtype)
            acc = tl.dot(left, right, acc)
    if SCALED:
        acc *= tl.load(x_scale + n, real, 0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + o, some, 0.0).to(tl.float32)[:, None]
    tl.store(out + n[None, :].to(tl.int64) * outputs + o[:, None], acc.to(dtype), some[:, None] & real[None, :])


@triton.jit
def _widen(words, scale, zero, out, outputs, width, groups, ZERO: tl.constexpr, BO: tl.constexpr, BW: tl.constexpr, T: tl.constexpr):
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    t = tl.program_id(1) * BW + tl.arange(0, BW)
    both = (o < outputs)[:, None] & (t < width)[None, :]
    w, s, z = _read(words, scale, zero, o, t, width, groups, both, ZERO, T)
    g = t // T
    at = out + o[:, None].to(tl.int64) * (8 * width) + (g * (8 * T) + t % T)[None, :]
    for j in tl.static_range(8):
        tl.store(at + j * T, ((((w >> (4 * j)) & 15).to(tl.float32) - z) * s).to(out.dtype.element_ty), both)


def vector(
    x_NI: Tensor, weight: "Packed4", bias: Tensor | None, x_scale: Tensor | None, dtype: torch.dtype, tile: tuple[int, int, int] | None = None
) -> Tensor:  # fmt: skip
    """As the reference, for few rows; `tile` instead of the table's, for tuning."""
    words, scale, zero = weight
    (outputs, width), groups = words.shape, scale.shape[1]
    t = width // groups
    o, w, warps = tile or next(found for most, found in VECTOR.items() if width <= most)
    y = torch.empty(x_NI.shape[0], outputs, dtype=dtype, device=x_NI.device)
    _vector[(triton.cdiv(outputs, o), x_NI.shape[0])](
        x_NI, words, scale, scale if zero is None else zero, scale if x_scale is None else x_scale, scale if bias is None else bias, y, outputs, groups,
        ZERO=zero is not None, SCALED=x_scale is not None, BIAS=bias is not None, BO=o, BG=min(max(1, w // t), triton.next_power_of_2(groups)), T=t, num_warps=warps,
    )  # fmt: skip
    return y


def matmul(
    x_NI: Tensor, weight: "Packed4", bias: Tensor | None, x_scale: Tensor | None, dtype: torch.dtype, tile: tuple[int, int, int, int, int] | None = None
) -> Tensor:
    """As the reference, for many rows; `tile` instead of the table's, for tuning."""
    words, scale, zero = weight
    (outputs, width), groups, rows = words.shape, scale.shape[1], x_NI.shape[0]
    n, o, w, warps, stages = tile or next(found for most, found in MATRIX.items() if rows <= most)
    y = torch.empty(rows, outputs, dtype=dtype, device=x_NI.device)
    _matrix[(triton.cdiv(outputs, o), triton.cdiv(rows, n))](
        x_NI, words, scale, scale if zero is None else zero, scale if x_scale is None else x_scale, scale if bias is None else bias, y,
        rows, outputs, width, groups,
        ZERO=zero is not None, SCALED=x_scale is not None, BIAS=bias is not None, BN=n, BO=o, BW=w, T=width // groups, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def widen(weight: "Packed4", dtype: torch.dtype) -> Tensor:
    """The weight [O, I] in `dtype`."""
    words, scale, zero = weight
    (outputs, width), groups = words.shape, scale.shape[1]
    out = torch.empty(outputs, 8 * width, dtype=dtype, device=words.device)
    _widen[(triton.cdiv(outputs, 16), triton.cdiv(width, 64))](
        words, scale, scale if zero is None else zero, out, outputs, width, groups, ZERO=zero is not None, BO=16, BW=64, T=width // groups, num_warps=4
    )  # fmt: skip
    return out
