"""INT4 weights in groups on tensor cores, for few rows: decoding. Many rows are cuBLAS's, on a weight widened for one call.

A warp multiplies 16 outputs by 8 rows, 16 inputs at a time, by PTX's mma.sync.m16n8k16. `Packed4` holds words in the order in
which its threads want them, so that a word becomes the four registers of a factor by a mask, an or and an addition each: a code
in the lowest bits of the mantissa of 128 (BF16) or 1024 (FP16) reads 128 or 1024 plus the code.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lowbit_sums import number

if TYPE_CHECKING:
    from ..int4_matmul import Packed4

# warps of a program, which share out the inputs, and what decides: with fewer, long rows take too many steps one after another;
# with more, less fits beside them, as many outputs or rows want (H200, benchmarks/packed_gpu.py --parts tune)
WARPS = (4, 8, 16)
# registers of a thread: left to itself, ptxas takes 40, and reads weights when they are needed instead of two steps ahead
REGISTERS = {4: 128, 8: 64, 16: 128}
LONG, MANY, FEW_ROWS = 8192, 16384, 8


@triton.jit
def _columns(pairs, BW: tl.constexpr):
    """The four columns of [BW, 4]."""
    even, odd = tl.split(tl.reshape(pairs, [BW, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


def _ptx(half: str, magic: str, one: str) -> str:
    """A word to four registers of two numbers each, and their product with two of inputs; a product with 1 adds, which BF16 cannot alone."""
    return f"""{{
    .reg .b32 a0, a1, a2, a3, one;
    mov.b32 one, {one};
    lop3.b32 a0, $4, $13, {magic}, 0xEA;
    shr.u32 a1, $4, 4;
    shr.u32 a2, $4, 8;
    shr.u32 a3, $4, 12;
    lop3.b32 a1, a1, $13, {magic}, 0xEA;
    lop3.b32 a2, a2, $13, {magic}, 0xEA;
    lop3.b32 a3, a3, $13, {magic}, 0xEA;
    fma.rn.{half}x2 a0, a0, one, $7;
    fma.rn.{half}x2 a1, a1, one, $8;
    fma.rn.{half}x2 a2, a2, one, $7;
    fma.rn.{half}x2 a3, a3, one, $8;
    mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {{$5, $6}}, {{$9, $10, $11, $12}};
    }}"""


_BF16 = tl.constexpr(_ptx("bf16", "0x43004300", "0x3F803F80"))
_FP16 = tl.constexpr(_ptx("f16", "0x64006400", "0x3C003C00"))


@triton.jit
def _step(w, b0, b1, low, high, c0, c1, c2, c3, mask, HALF: tl.constexpr, PTX: tl.constexpr, BW: tl.constexpr):
    """Adds 16 inputs: registers of a thread as mma.sync names them; `low` and `high` are added to what the codes of its two outputs read as."""
    if PTX:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            _BF16 if HALF == "bf16" else _FP16,
            "=f,=f,=f,=f,r,r,r,r,r,f,f,f,f,r",
            [w, b0, b1, low, high, c0, c1, c2, c3, mask],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        c0, c1, c2, c3 = _plain_step(w, b0, b1, low, high, c0, c1, c2, c3, HALF, BW)
    return c0, c1, c2, c3


@triton.jit
def _plain_step(w, b0, b1, low, high, c0, c1, c2, c3, HALF: tl.constexpr, BW: tl.constexpr):
    """`_step` without PTX, as definition and for where its threads would not hold what it expects."""
    WARPS: tl.constexpr = BW // 32
    OFFSET: tl.constexpr = 128.0 if HALF == "bf16" else 1024.0
    z0, z1 = number(low, False, HALF) + OFFSET, number(high, False, HALF) + OFFSET
    upper = w >> 16
    a0, a0u = (w & 15).to(tl.float32) + z0, (upper & 15).to(tl.float32) + z0
    a1, a1u = ((w >> 4) & 15).to(tl.float32) + z1, ((upper >> 4) & 15).to(tl.float32) + z1
    a2, a2u = ((w >> 8) & 15).to(tl.float32) + z0, ((upper >> 8) & 15).to(tl.float32) + z0
    a3, a3u = ((w >> 12) & 15).to(tl.float32) + z1, ((upper >> 12) & 15).to(tl.float32) + z1
    first, second = _four(a0, a0u, a2, a2u, WARPS), _four(a1, a1u, a3, a3u, WARPS)
    x = _four(number(b0, False, HALF), number(b0, True, HALF), number(b1, False, HALF), number(b1, True, HALF), WARPS)
    y0 = tl.sum(first[:, :, None, :] * x[:, None, :, :], 3)
    y1 = tl.sum(second[:, :, None, :] * x[:, None, :, :], 3)
    d0, d1 = tl.split(tl.reshape(y0, [BW, 2]))
    d2, d3 = tl.split(tl.reshape(y1, [BW, 2]))
    return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@triton.jit
def _four(a, b, c, d, WARPS: tl.constexpr):
    """[warps, 8, 16] of four numbers a thread; the last axis is thread by thread."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [WARPS, 8, 16])


@triton.jit
def _weights(w_at, scale, zero, place, chunk, chunks, here, ZERO: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr):
    """Words, scales and zero points of each thread's chunk."""
    at = (place + (here + chunk) * 64 // GROUP * 16)[:, None] + tl.arange(0, 2)[None, :]
    if EVEN:
        w, s = tl.load(w_at + here * 128, eviction_policy="evict_first"), tl.load(scale + at)
        z = s
        if ZERO:
            z = tl.load(zero + at)
    else:
        inside = (here + chunk < chunks)[:, None]
        w, s = tl.load(w_at + here * 128, inside, 0), tl.load(scale + at, inside, 0.0)
        z = s
        if ZERO:
            z = tl.load(zero + at, inside, 0.0)
    return w, s, z


@triton.jit
def _inputs(x_at, chunk, chunks, real, here, EVEN: tl.constexpr):
    """Inputs of each thread's chunk, in registers of two."""
    used = (real if EVEN else real & (here + chunk < chunks))[:, None]
    return tl.load(x_at + here * 32, used, 0), tl.load(x_at + here * 32 + 16, used, 0)


@triton.jit
def _kernel(
    x, words, scale, zero, x_scale, bias, out, rows, outputs, chunks, groups, mask,
    ZERO: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    BW: tl.constexpr = 32 * WARPS
    tile, n0 = tl.program_id(0), tl.program_id(1) * 8
    i = tl.arange(0, BW)
    chunk, lane, g, q = i // 32, i % 32, i % 32 // 4, i % 4
    four, two = tl.arange(0, 4), tl.arange(0, 2)
    mask = tl.zeros([BW], tl.int32) + mask
    w_at = words + ((tile * chunks + chunk) * 128 + lane * 4)[:, None] + four[None, :]
    place = tile * groups * 16 + g * 2
    # in registers of two inputs: 8 inputs of the first 32 of a chunk; 16 registers further 8 of the others
    x_at = x + ((n0 + g) * (chunks * 32) + chunk * 32 + q * 4)[:, None] + four[None, :]
    real = n0 + g < rows
    none = tl.zeros([BW], tl.float32)
    y0, y1, y2, y3 = none, none, none, none
    low = tl.zeros([BW], tl.int32) + (-0x3CF73CF8 if HALF == "bf16" else -0x1BF71BF8)  # -136 or -1032, twice
    high = low
    # weights are read two steps ahead, inputs one; after the last chunks these again, or nothing
    last = chunks - WARPS
    ahead = tl.minimum(WARPS, last) if EVEN else WARPS
    w, s, z = _weights(w_at, scale, zero, place, chunk, chunks, 0, ZERO, EVEN, GROUP)
    w_next, s_next, z_next = _weights(w_at, scale, zero, place, chunk, chunks, ahead, ZERO, EVEN, GROUP)
    xa, xb = _inputs(x_at, chunk, chunks, real, 0, EVEN)
    for start in tl.range(0, chunks, WARPS, loop_unroll_factor=2):
        one, two_on = start + WARPS, start + 2 * WARPS
        if EVEN:
            one, two_on = tl.minimum(one, last), tl.minimum(two_on, last)
        w_after, s_after, z_after = _weights(w_at, scale, zero, place, chunk, chunks, two_on, ZERO, EVEN, GROUP)
        xa_next, xb_next = _inputs(x_at, chunk, chunks, real, one, EVEN)
        x0, x1, x2, x3 = _columns(xa, BW)
        x4, x5, x6, x7 = _columns(xb, BW)
        w0, w1, w2, w3 = _columns(w, BW)
        s0, s1 = tl.split(s.to(tl.float32))
        if ZERO:
            low, high = _taken(z, HALF)
        c0, c1, c2, c3 = _step(w0, x0, x1, low, high, none, none, none, none, mask, HALF, PTX, BW)
        c0, c1, c2, c3 = _step(w1, x2, x3, low, high, c0, c1, c2, c3, mask, HALF, PTX, BW)
        if GROUP < 64:
            y0, y1, y2, y3 = y0 + c0 * s0, y1 + c1 * s0, y2 + c2 * s1, y3 + c3 * s1
            inside = start + chunk < chunks
            at = (place + (start + chunk) * 64 // GROUP * 16 + 16)[:, None] + two[None, :]
            s0, s1 = tl.split(tl.load(scale + at, inside[:, None], 0.0).to(tl.float32))
            if ZERO:
                low, high = _taken(tl.load(zero + at, inside[:, None], 0.0), HALF)
            c0, c1, c2, c3 = none, none, none, none
        c0, c1, c2, c3 = _step(w2, x4, x5, low, high, c0, c1, c2, c3, mask, HALF, PTX, BW)
        c0, c1, c2, c3 = _step(w3, x6, x7, low, high, c0, c1, c2, c3, mask, HALF, PTX, BW)
        y0, y1, y2, y3 = y0 + c0 * s0, y1 + c1 * s0, y2 + c2 * s1, y3 + c3 * s1
        w, s, z = w_next, s_next, z_next
        w_next, s_next, z_next = w_after, s_after, z_after
        xa, xb = xa_next, xb_next
    t = tl.arange(0, 32)
    o, n = tile * 16 + t // 4, n0 + t % 4 * 2
    _finish(y0, x_scale, bias, out, n, o, rows, outputs, SCALED, BIAS, WARPS)
    _finish(y1, x_scale, bias, out, n + 1, o, rows, outputs, SCALED, BIAS, WARPS)
    _finish(y2, x_scale, bias, out, n, o + 8, rows, outputs, SCALED, BIAS, WARPS)
    _finish(y3, x_scale, bias, out, n + 1, o + 8, rows, outputs, SCALED, BIAS, WARPS)


@triton.jit
def _taken(z, HALF: tl.constexpr):
    """`low` and `high` of a step, from the zero points of a thread's two outputs."""
    z0, z1 = tl.split(z.to(tl.float32))
    return _twice(z0, HALF), _twice(z1, HALF)


@triton.jit
def _twice(z, HALF: tl.constexpr):
    if HALF == "bf16":
        bits = (-136.0 - z).to(tl.float32).to(tl.int32, bitcast=True)  # whole numbers below 256: exact in BF16
        return (bits & -65536) | ((bits >> 16) & 0xFFFF)
    else:
        bits = (-1032.0 - z).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return bits | (bits << 16)


@triton.jit
def _finish(y, x_scale, bias, out, n, o, rows, outputs, SCALED: tl.constexpr, BIAS: tl.constexpr, WARPS: tl.constexpr):
    total = tl.sum(tl.reshape(y, [WARPS, 32]), 0)
    real = n < rows
    if SCALED:
        total *= tl.load(x_scale + n, real, 0.0)
    if BIAS:
        total += tl.load(bias + o).to(tl.float32)
    tl.store(out + n * outputs + o, total.to(out.dtype.element_ty), real)


@triton.jit
def _widen(words, scale, zero, out, chunks, groups, ZERO: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr):
    BW: tl.constexpr = 32 * WARPS
    tile = tl.program_id(0)
    i = tl.arange(0, BW)
    chunk, lane, g, q = tl.program_id(1) * WARPS + i // 32, i % 32, i % 32 // 4, i % 4
    inside = chunk < chunks
    w0, w1, w2, w3 = _columns(tl.load(words + ((tile * chunks + chunk) * 128 + lane * 4)[:, None] + tl.arange(0, 4)[None, :], inside[:, None], 0), BW)
    inputs = chunks * 64
    at = out + (tile * 16 + g).to(tl.int64) * inputs + chunk * 64 + q * 8
    _widen_half(w0, w1, scale, zero, at, tile * groups + chunk * 64 // GROUP, g, inside, inputs, ZERO, BW)
    _widen_half(w2, w3, scale, zero, at + 32, tile * groups + (chunk * 64 + 32) // GROUP, g, inside, inputs, ZERO, BW)


@triton.jit
def _widen_half(a, b, scale, zero, at, group, g, inside, inputs, ZERO: tl.constexpr, BW: tl.constexpr):
    two, eight = tl.arange(0, 2), tl.arange(0, 8)
    place = group * 16 + g * 2
    at_two = place[:, None] + two[None, :]
    s0, s1 = tl.split(tl.load(scale + at_two, inside[:, None], 0.0).to(tl.float32))
    z0, z1 = s0 * 0.0 + 8.0, s1 * 0.0 + 8.0
    if ZERO:
        t0, t1 = tl.split(tl.load(zero + at_two, inside[:, None], 0.0).to(tl.float32))
        z0, z1 = z0 + t0, z1 + t1
    first = (_eight(a, b, BW).to(tl.float32) - z0[:, None]) * s0[:, None]
    second = (_eight(a >> 4, b >> 4, BW).to(tl.float32) - z1[:, None]) * s1[:, None]
    to = at[:, None] + eight[None, :]
    tl.store(to, first.to(to.dtype.element_ty), inside[:, None])
    tl.store(to + 8 * inputs, second.to(to.dtype.element_ty), inside[:, None])


@triton.jit
def _eight(a, b, BW: tl.constexpr):
    """[BW, 8] codes of an output, in the order of the inputs; of two words, nibbles 0, 4, 2, 6."""
    lower = tl.join(tl.join(a & 15, b & 15), tl.join((a >> 8) & 15, (b >> 8) & 15))
    upper = tl.join(tl.join((a >> 16) & 15, (b >> 16) & 15), tl.join((a >> 24) & 15, (b >> 24) & 15))
    return tl.reshape(tl.join(lower, upper), [BW, 8])


def matmul(
    x_NI: Tensor,
    weight: "Packed4",
    bias: Tensor | None,
    x_scale: Tensor | None,
    dtype: torch.dtype,
    warps: int | None = None,
    ptx: bool = True,
    registers: int | None = None,
) -> Tensor:
    """As the reference.

    Args:
        warps, registers: instead of what its shape gets, for tuning.
        ptx: False: the same sums without tensor cores, which Triton's interpreter runs as well.
    """
    words, scale, zero = weight
    chunks, groups, (rows, outputs) = words.shape[1], scale.shape[1], (x_NI.shape[0], weight.outputs)
    if warps is None:
        few, is_long = rows <= FEW_ROWS, chunks * 64 > LONG
        warps = (16 if few else 8) if is_long else 8 if few and outputs < MANY else 4
    y = torch.empty(rows, outputs, dtype=dtype, device=x_NI.device)
    x = x_NI.to(dtype).reshape(-1)
    x = x.clone() if x.storage_offset() % 2 else x  # two numbers are read at a time
    _kernel[(words.shape[0], triton.cdiv(rows, 8))](
        x.view(torch.int32), words, scale, scale if zero is None else zero, scale if x_scale is None else x_scale,
        scale if bias is None else bias, y, rows, outputs, chunks, groups, 0x000F000F,
        ZERO=zero is not None, SCALED=x_scale is not None, BIAS=bias is not None, EVEN=chunks % warps == 0, GROUP=weight.group_size,
        HALF="bf16" if dtype == torch.bfloat16 else "fp16", PTX=ptx, WARPS=warps, num_warps=warps, maxnreg=registers or REGISTERS.get(warps),
    )  # fmt: skip
    return y


def widen(weight: "Packed4", dtype: torch.dtype) -> Tensor:
    """The weight [O, I] in `dtype`."""
    words, scale, zero = weight
    chunks, groups = words.shape[1], scale.shape[1]
    out = torch.empty(weight.outputs, 64 * chunks, dtype=dtype, device=words.device)
    _widen[(words.shape[0], triton.cdiv(chunks, 4))](
        words, scale, scale if zero is None else zero, out, chunks, groups, ZERO=zero is not None, GROUP=weight.group_size, WARPS=4, num_warps=4
    )  # fmt: skip
    return out
