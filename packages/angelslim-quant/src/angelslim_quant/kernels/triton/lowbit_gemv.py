"""Weights of at most four levels without mma.sync: products of a row or a few, and the weight in 16 bits.

A code at the upper end of a mantissa of fp32 reads as the code and 4, 16, 64 or 256, by its place; these are taken off with the zero.
"""
# ruff: noqa: RUF005  (Triton compiles no unpacking)
# mypy: disable-error-code="assignment"

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lowbit_matmul import place
from .lowbit_matmul import _inputs, _ordered, _places, _weights, columns, scales_of, tile_words
from .lowbit_sums import number, turned

if TYPE_CHECKING:
    from ..lowbit_matmul import PackedLow

# more rows are cuBLAS's
GEMV_ROWS = 4
_place = triton.constexpr_function(place)


@triton.constexpr_function
def _offset(at):
    """What a code with its lower bit at `at` reads as more than itself, turned to bits 15 to 22."""
    return 256 >> (at - 15) % 8


@triton.jit
def _read(word, AT: tl.constexpr):
    """A code and its offset, in fp32."""
    BIT: tl.constexpr = 15 + (AT - 15) % 8
    return ((turned(word, (AT - BIT) % 32) & (3 << BIT)) | ((150 - BIT) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _added(y, words, scales, scale, x, zero, SPARSE: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BW: tl.constexpr):
    """Adds a chunk to a thread's sums, by tile and output."""
    SEGMENTS: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    for segment in tl.static_range(SEGMENTS):
        none = tl.zeros([BW], tl.float32)
        c, taken = (none, none, none, none), (none, none)
        for i in tl.static_range(32):  # by word, and input of it
            if SEGMENTS == 1 or (i // 4 % 2 if SPARSE else i // (32 // SEGMENTS)) == segment:
                value = number(x[i // 2], i % 2, HALF)
                one, other = taken
                taken = (one + value * (_offset(_place(0, i % 8)) + zero), other + value * (_offset(_place(1, i % 8)) + zero))
                first, second = words[0][i // 8], words[1][i // 8]
                c0, c1, c2, c3 = c
                c0, c1 = c0 + value * _read(first, _place(0, i % 8)), c1 + value * _read(first, _place(1, i % 8))
                c2, c3 = c2 + value * _read(second, _place(0, i % 8)), c3 + value * _read(second, _place(1, i % 8))
                c = (c0, c1, c2, c3)
        if GROUP > 0:
            s = scales_of(scales[segment], scale, BW)
        new = ()
        for k in tl.static_range(4):
            value = c[k] - taken[k % 2]
            if GROUP > 0:
                value = value * s[k]
            new = new + (y[k] + value,)
        y = new
    return y


@triton.jit
def _gemv(
    x, words, scale, bias, out, outputs, inputs, row, chunks, groups, zero,
    SPARSE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    BW: tl.constexpr = 32 * WARPS
    i = tl.arange(0, BW)
    chunk = i // 32
    tile, n = tl.program_id(0), tl.program_id(1)
    at = _places(words, scale, tile, chunk, chunks, groups, i, SPARSE, GROUP)
    x_at = (x + (n * row + chunk * 64 + i % 4 * 4)[:, None] + tl.arange(0, 4)[None, :],)
    none = tl.zeros([BW], tl.float32)
    y = (none, none, none, none)
    last = chunks - WARPS
    wa, wb, ws = _weights(at, chunk, chunks, 0, SPARSE, EVEN, GROUP)
    xs = _inputs(x_at, chunk * 128, inputs, 0, FULL)
    for start in tl.range(0, chunks, WARPS):
        one = tl.minimum(start + WARPS, last) if EVEN else start + WARPS
        next_a, next_b, next_s = _weights(at, chunk, chunks, one, SPARSE, EVEN, GROUP)
        next_x = _inputs(x_at, chunk * 128, inputs, one, FULL)
        ordered = ()
        for k in tl.static_range(4):
            ordered = ordered + columns(xs[k], BW)
        y = _added(y, tile_words(wa, wb, SPARSE, BW), ws, scale, _ordered(ordered, SPARSE), zero, SPARSE, GROUP, HALF, BW)
        wa, wb, ws, xs = next_a, next_b, next_s, next_x
    both = tl.join(tl.join(y[0], y[1]), tl.join(y[2], y[3]))  # [BW, output, tile]
    total = tl.sum(tl.sum(tl.reshape(both, [WARPS, 8, 4, 4]), 2), 0)
    g, k = tl.arange(0, 8)[:, None], tl.arange(0, 4)[None, :]
    o = tile * 32 + k % 2 * 16 + k // 2 * 8 + g
    if GROUP == 0:
        total *= tl.load(scale + tile * 32 + g * 4 + k % 2 * 2 + k // 2).to(tl.float32)
    if BIAS:
        total += tl.load(bias + o).to(tl.float32)
    tl.store(out + n * outputs + o, total.to(out.dtype.element_ty))


@triton.jit
def _code(words, PART: tl.constexpr, R: tl.constexpr, COLUMN: tl.constexpr, zero, SPARSE: tl.constexpr):
    """The value of input COLUMN of a part, without scale."""
    if SPARSE:
        return (turned(words[COLUMN % 4], _place(R, 2 * PART + COLUMN // 4)) & 3).to(tl.float32) - zero
    else:
        return (turned(words[PART], _place(R, COLUMN)) & 3).to(tl.float32) - zero


@triton.jit
def _widen(words, scale, out, inputs, chunks, groups, zero, SPARSE: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr):
    BW: tl.constexpr = 32 * WARPS
    i = tl.arange(0, BW)
    lane, g, q = i % 32, i % 32 // 4, i % 4
    tile, chunk = tl.program_id(0), tl.program_id(1) * WARPS + i // 32
    four, eight = tl.arange(0, 4)[None, :], tl.arange(0, 8)[None, :]
    inside = chunk < chunks
    first = words + (tile * chunks + chunk) * (160 if SPARSE else 256)
    wide = tl.load((first + lane * 4)[:, None] + four, inside[:, None], 0)
    if SPARSE:
        more = tl.load(first + 128 + lane, inside, 0)
    else:
        more = tl.load((first + 128 + lane * 4)[:, None] + four, inside[:, None], 0)
    both = tile_words(wide, more, SPARSE, BW)
    for part in tl.static_range(4):
        column = chunk * 128 + part * 32 + q * 8
        real = column < inputs
        group = column // GROUP if GROUP > 0 else 0
        for t in tl.static_range(2):
            for r in tl.static_range(2):
                s = tl.load(scale + ((tile * groups + group) * 8 + g) * 4 + 2 * t + r, real, 0.0).to(tl.float32)
                a = tl.join(_code(both[t], part, r, 0, zero, SPARSE), _code(both[t], part, r, 4, zero, SPARSE))
                b = tl.join(_code(both[t], part, r, 2, zero, SPARSE), _code(both[t], part, r, 6, zero, SPARSE))
                c = tl.join(_code(both[t], part, r, 1, zero, SPARSE), _code(both[t], part, r, 5, zero, SPARSE))
                d = tl.join(_code(both[t], part, r, 3, zero, SPARSE), _code(both[t], part, r, 7, zero, SPARSE))
                values = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [BW, 8])  # [BW, i // 4, i // 2 % 2, i % 2]
                to = (out + (tile * 32 + 16 * t + 8 * r + g).to(tl.int64) * inputs + column)[:, None] + eight
                tl.store(to, (values * s[:, None]).to(out.dtype.element_ty), real[:, None])


def gemv(x_NI: Tensor, weight: "PackedLow", bias: Tensor | None, dtype: torch.dtype, warps: int = 8) -> Tensor:
    """As the reference, a row at a time."""
    rows, chunks = x_NI.shape[0], weight.chunks
    x = x_NI.to(dtype).reshape(-1)
    x = x.clone() if x.storage_offset() % 2 else x  # two numbers are read at a time
    y = torch.empty(rows, weight.outputs, dtype=dtype, device=x.device)
    even = chunks % warps == 0
    _gemv[(weight.words.shape[0], rows)](
        x.view(torch.int32), weight.words, weight.scale, weight.scale if bias is None else bias, y,
        weight.outputs, weight.inputs, weight.inputs // 2, chunks, weight.scale.shape[1], weight.zero,
        SPARSE=weight.sparse, BIAS=bias is not None, EVEN=even, FULL=even and weight.inputs % 128 == 0, GROUP=weight.group,
        HALF="bf16" if dtype == torch.bfloat16 else "fp16", WARPS=warps, num_warps=warps,
    )  # fmt: skip
    return y


def widen(weight: "PackedLow", dtype: torch.dtype) -> Tensor:
    """The weight [O, I] in `dtype`."""
    out = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device=weight.words.device)
    _widen[(weight.words.shape[0], triton.cdiv(weight.chunks, 4))](
        weight.words, weight.scale, out, weight.inputs, weight.chunks, weight.scale.shape[1], weight.zero,
        SPARSE=weight.sparse, GROUP=weight.group, WARPS=4, num_warps=4,
    )  # fmt: skip
    return out
