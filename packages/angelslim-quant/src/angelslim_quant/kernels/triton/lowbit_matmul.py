"""Weights of at most four levels on tensor cores, for few rows: decoding. Many rows are cuBLAS's, on a weight widened for one call.

As INT4's kernel, with half the bytes: what counts is instructions a code, and none of them waiting for memory. A pair of codes becomes
a register of mma.sync.m16n8k16 by one mask-and-or, with half a turn of the word for it: two bits of a mantissa read as 4 or 16 more than
the code. These, and the zero, are taken off once for all outputs: another product, of constants with the inputs, is added to the sums.
Five bits are first made two bits of eight words, all 32 of a plane at once.
"""
# ruff: noqa: RUF005  (Triton compiles no unpacking)
# mypy: disable-error-code="assignment, misc"

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lowbit_sums import constants, sums, turned

if TYPE_CHECKING:
    from ..lowbit_matmul import PackedLow

# rows of a product of mma.sync
ROWS = 8
# that many are written out one after another
FEW_STEPS = 4


class Shape(NamedTuple):
    """How a product is divided.

    Args:
        warps: of a program.
        wide: warps of these beside one another along the outputs; the others share out the inputs.
        split: programs that share out the inputs, in turns.
        ahead: inputs are read a step before they are needed, which takes registers.
        deep: steps that weights are read ahead.
        registers: of a thread: left to itself, ptxas takes fewer, and reads weights when they are needed instead of ahead.
    """

    warps: int
    wide: int = 1
    split: int = 1
    registers: int = 128
    ahead: bool = True
    deep: int = 2


@triton.jit
def columns(pairs, BW: tl.constexpr):
    """The four columns of [BW, 4]."""
    even, odd = tl.split(tl.reshape(pairs, [BW, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def tile_words(first, second, SPARSE: tl.constexpr, BW: tl.constexpr):
    """Words of two bits a weight of a thread's chunk, four for each of two times 16 outputs."""
    a0, a1, a2, a3 = columns(first, BW)
    if SPARSE:
        # bits, all at once: which of four is zero, and which is 1
        none0, none1, none2, none3 = ~(a0 | a1), a0 & ~a1, a1 & ~a0, a0 & a1
        last = (none0 & a2) | (none1 & a3) | (none2 & second)
        w0, v0 = _interleaved(none0, a2 & ~none0)
        w1, v1 = _interleaved(none1, a3 & ~none1)
        w2, v2 = _interleaved(none2, second & ~none2)
        w3, v3 = _interleaved(none3, last)
        return (w0, w1, w2, w3), (v0, v1, v2, v3)
    else:
        b0, b1, b2, b3 = columns(second, BW)
        return (a0, a2, b0, b2), (a1, a3, b1, b3)


@triton.jit
def _interleaved(low, high):
    """Codes of two bits: odd places hold the lower bit, the even ones above (in a circle) the higher."""
    odd: tl.constexpr = -0x55555556
    even: tl.constexpr = 0x55555555
    return (low & odd) | (turned(high, 31) & even), (turned(low, 1) & odd) | (high & even)


@triton.jit
def _ordered(xs, SPARSE: tl.constexpr):
    """Registers of two inputs by word, half and place: as they are read, or inputs of four apart in places of four beside each other."""
    if not SPARSE:
        return xs
    else:
        found = ()
        for j in tl.static_range(4):
            for part in tl.static_range(4):
                found = found + (_pair(xs[4 * part + j // 2], xs[4 * part + 2 + j // 2], j % 2),)
        return found


@triton.jit
def _pair(a, b, UPPER: tl.constexpr):
    """Lower or upper halves of two registers as one."""
    if UPPER:
        return ((a >> 16) & 0xFFFF) | (b & -65536)
    else:
        return (a & 0xFFFF) | (b << 16)


@triton.jit
def _part(xs, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, SPARSE: tl.constexpr):
    """Of registers by word, half and place those of a segment of the chunk that shares a scale."""
    found = ()
    for i in tl.static_range(16):
        if (i // 2 % 2 if SPARSE else i // (16 // SEGMENTS)) == SEGMENT or SEGMENTS == 1:
            found = found + (xs[i],)
    return found


@triton.jit
def _weights(at, scale, place, chunk, chunks, here, SPARSE: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr):
    """Words and scales of each thread's chunk; `at`: where its words are in the first chunk."""
    SEGMENTS: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    WORDS: tl.constexpr = 160 if SPARSE else 256
    inside = (here + chunk < chunks)[:, None]
    scales = ()
    if GROUP > 0:
        group = ((here + chunk) * 128 // GROUP * 32 + place)[:, None] + tl.arange(0, 4)[None, :]
        for segment in tl.static_range(SEGMENTS):
            if EVEN:
                scales = scales + (tl.load(scale + group + 32 * segment),)
            else:
                scales = scales + (tl.load(scale + group + 32 * segment, inside, 0.0),)
    wide = at[0] + here * WORDS
    more = at[1] + here * WORDS
    if EVEN:
        return tl.load(wide, eviction_policy="evict_first"), tl.load(more, eviction_policy="evict_first"), scales
    elif SPARSE:
        return tl.load(wide, inside, 0), tl.load(more, here + chunk < chunks, 0), scales
    else:
        return tl.load(wide, inside, 0), tl.load(more, inside, 0), scales


@triton.jit
def _inputs(x_at, column, inputs, n, rows, here, FULL: tl.constexpr, PASSES: tl.constexpr, row):
    """Inputs of each thread's chunk, four times [BW, 4] registers of two a pass."""
    found = ()
    for p in tl.static_range(PASSES):
        for part in tl.static_range(4):
            used = n + 8 * p < rows
            if not FULL:
                used = used & (here * 128 + column + 32 * part < inputs)
            found = found + (tl.load(x_at + (8 * p * row + here * 64 + 16 * part), used[:, None], 0),)
    return found


@triton.jit
def _added(
    y, weights, xs, masks, high, low,
    SPARSE: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PASSES: tl.constexpr, PTX: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Adds a chunk to the sums, by tile, pass, and register."""
    first, second, scales = weights
    words = tile_words(first, second, SPARSE, BW)
    SEGMENTS: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    HALVES: tl.constexpr = 1 if SPARSE and SEGMENTS == 2 else 2
    for segment in tl.static_range(SEGMENTS):
        used, taken = (), ()
        for p in tl.static_range(PASSES):
            ordered = ()
            for i in tl.static_range(4):
                ordered = ordered + columns(xs[4 * p + i], BW)
            part = _part(_ordered(ordered, SPARSE), segment, SEGMENTS, SPARSE)
            used = used + part
            taken = taken + constants(high, low, part, HALF, PTX, BW)
        if GROUP > 0:
            s = columns(scales[segment].to(tl.float32), BW)
        new = ()
        for tile in tl.static_range(2):
            own = ()
            for i in tl.static_range(4):
                if SPARSE or i // (4 // SEGMENTS) == segment:
                    own = own + (words[tile][i],)
            c = sums(own, masks, used, segment if SPARSE else 0, HALVES, HALF, PASSES, PTX, BW)
            for k in tl.static_range(4 * PASSES):
                value = c[k] + taken[k // 4 * 2 + k % 2]
                if GROUP > 0:
                    value = value * s[2 * tile + k % 4 // 2]
                new = new + (y[4 * PASSES * tile + k] + value,)
        y = new
    return y


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x, words, scale, bias, out, partial, turns, rows, outputs, inputs, row, chunks, groups, high, low, mask_high, mask_low,
    SPARSE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr,
    PASSES: tl.constexpr, WARPS: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr, DEEP: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    BW: tl.constexpr = 32 * WARPS
    SHARES: tl.constexpr = WARPS // WIDE
    STEP: tl.constexpr = SHARES * SPLIT
    i = tl.arange(0, BW)
    lane, g, q = i % 32, i % 32 // 4, i % 4
    tile = tl.program_id(0) * WIDE + i // 32 % WIDE
    n0 = tl.program_id(1) * 8 * PASSES
    chunk = tl.program_id(2) * SHARES + i // 32 // WIDE
    zero = tl.zeros([BW], tl.int32)
    masks = (zero + mask_high, zero + mask_low)
    high, low = zero + high, zero + low
    four = tl.arange(0, 4)[None, :]
    first = words + (tile * chunks + chunk) * (160 if SPARSE else 256)
    if SPARSE:
        at = ((first + lane * 4)[:, None] + four, first + 128 + lane)
    else:
        at = ((first + lane * 4)[:, None] + four, (first + 128 + lane * 4)[:, None] + four)
    place = (tile * groups * 8 + g) * 4
    x_at = x + ((n0 + g) * row + chunk * 64 + q * 4)[:, None] + four
    column = chunk * 128
    none = tl.zeros([BW], tl.float32)
    y = ()
    for _ in tl.static_range(8 * PASSES):
        y = y + (none,)
    if GROUP == 0:
        s = columns(tl.load(scale + place[:, None] + four).to(tl.float32), BW)
    # weights are read some steps ahead, inputs one; after the last chunks, where there are many, these again, or nothing
    last = chunks - STEP
    queue = ()
    for k in tl.static_range(DEEP if STEPS == 0 or DEEP < STEPS else STEPS):
        queue = queue + (_weights(at, scale, place, chunk, chunks, tl.minimum(k * STEP, last) if EVEN else k * STEP, SPARSE, EVEN, GROUP),)
    xs = ()
    if AHEAD:
        xs = _inputs(x_at, column, inputs, n0 + g, rows, 0, FULL, PASSES, row)
    if STEPS > 0:
        for k in tl.static_range(STEPS):
            if k + DEEP < STEPS:
                queue = queue + (_weights(at, scale, place, chunk, chunks, (k + DEEP) * STEP, SPARSE, EVEN, GROUP),)
            here = xs if AHEAD else _inputs(x_at, column, inputs, n0 + g, rows, k * STEP, FULL, PASSES, row)
            if AHEAD and k + 1 < STEPS:
                xs = _inputs(x_at, column, inputs, n0 + g, rows, (k + 1) * STEP, FULL, PASSES, row)
            y = _added(y, queue[k], here, masks, high, low, SPARSE, GROUP, HALF, PASSES, PTX, BW)
    else:
        for start in tl.range(0, chunks, STEP, loop_unroll_factor=DEEP):
            one, far = start + STEP, start + DEEP * STEP
            if EVEN:
                one, far = tl.minimum(one, last), tl.minimum(far, last)
            after = _weights(at, scale, place, chunk, chunks, far, SPARSE, EVEN, GROUP)
            next_x = _inputs(x_at, column, inputs, n0 + g, rows, one if AHEAD else start, FULL, PASSES, row)
            y = _added(y, queue[0], xs if AHEAD else next_x, masks, high, low, SPARSE, GROUP, HALF, PASSES, PTX, BW)
            moved = ()
            for k in tl.static_range(1, DEEP):
                moved = moved + (queue[k],)
            queue = moved + (after,)
            if AHEAD:
                xs = next_x
    if GROUP == 0:
        new = ()
        for k in tl.static_range(8 * PASSES):
            new = new + (y[k] * s[2 * (k // (4 * PASSES)) + k % 4 // 2],)
        y = new
    for p in tl.static_range(PASSES):
        a = _joined(y[4 * p], y[4 * p + 1], y[4 * p + 2], y[4 * p + 3])
        b = _joined(y[4 * PASSES + 4 * p], y[4 * PASSES + 4 * p + 1], y[4 * PASSES + 4 * p + 2], y[4 * PASSES + 4 * p + 3])
        sums = tl.reshape(tl.join(a, b), [SHARES, WIDE * 256])
        total = tl.sum(sums, 0) if SHARES > 1 else tl.reshape(sums, [WIDE * 256])
        f = tl.arange(0, WIDE * 256)
        thread = f // 8 % 32
        o = (tl.program_id(0) * WIDE + f // 256) * 32 + f % 2 * 16 + f // 2 % 2 * 8 + thread // 4
        n = n0 + 8 * p + thread % 4 * 2 + f // 4 % 2
        to, real = n * outputs + o, n < rows
        if SPLIT > 1:
            tl.store(partial + tl.program_id(2) * rows * outputs + to, total, real)
            turn = turns + (tl.program_id(1) * PASSES + p) * tl.num_programs(0) + tl.program_id(0)
            tl.debug_barrier()
            done = tl.atomic_add(turn, 1)
            if done == SPLIT - 1:  # the last of them adds all, in their order, and leaves the counter as it was
                total = tl.zeros([WIDE * 256], tl.float32)
                for other in tl.static_range(SPLIT):
                    total += tl.load(partial + other * rows * outputs + to, real, 0.0, cache_modifier=".cg")
                _store(total, bias, out, to, o, real, BIAS)
                tl.store(turn, 0)
        else:
            _store(total, bias, out, to, o, real, BIAS)


@triton.jit
def _joined(a, b, c, d):
    """[BW, 2, 2]."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _store(total, bias, out, to, o, real, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias + o).to(tl.float32)
    tl.store(out + to, total.to(out.dtype.element_ty), real)


# for a row to 8 by how many inputs there are, and for more; measured on an H200 (benchmarks/lowbit_gpu.py --tune)
LONG, SHORT, MANY_ROWS = Shape(16), Shape(8), Shape(8, ahead=False)
SHAPES = (LONG, SHORT, MANY_ROWS)


def shape(rows: int, chunks: int) -> Shape:
    """How a product is divided."""
    return MANY_ROWS if rows > ROWS else LONG if chunks >= 32 else SHORT


def matmul(x_NI: Tensor, weight: "PackedLow", bias: Tensor | None, dtype: torch.dtype, divided: Shape | None = None, ptx: bool = True) -> Tensor:
    """As the reference.

    Args:
        divided: instead of what its shape gets, for tuning.
        ptx: False: the same sums as definition, for Triton's interpreter; compiling them takes minutes.
    """
    rows, tiles, chunks = x_NI.shape[0], weight.words.shape[0], weight.chunks
    warps, wide, split, registers, ahead, deep = divided or shape(rows, chunks)
    half, passes = "bf16" if dtype == torch.bfloat16 else "fp16", 1 if rows <= ROWS else 2
    x = x_NI.to(dtype).reshape(-1)
    x = x.clone() if x.storage_offset() % 2 else x  # two numbers are read at a time
    y = torch.empty(rows, weight.outputs, dtype=dtype, device=x.device)
    high, low = (_twice(-at - weight.zero, dtype) for at in (4, 16))
    partial, turns = (torch.empty(split, rows, weight.outputs, device=x.device), _turns(weight)) if split > 1 else (y, y)
    even, steps = chunks % (warps // wide * split) == 0, -(-chunks // (warps // wide * split))
    _kernel[(tiles // wide, triton.cdiv(rows, ROWS * passes), split)](
        x.view(torch.int32), weight.words, weight.scale, weight.scale if bias is None else bias, y, partial, turns,
        rows, weight.outputs, weight.inputs, weight.inputs // 2, chunks, weight.scale.shape[1], high, low, *_MASKS[half],
        SPARSE=weight.sparse, BIAS=bias is not None, EVEN=even, FULL=even and weight.inputs % 128 == 0, GROUP=weight.group,
        HALF=half, PTX=ptx, PASSES=passes, WARPS=warps, WIDE=wide, SPLIT=split, AHEAD=ahead, DEEP=deep, STEPS=steps if steps <= FEW_STEPS else 0, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return y


# of codes in both halves of a word: the upper pair, and the lower
_MASKS = {"bf16": (0x00600060, 0x00180018), "fp16": (0x03000300, 0x00C000C0)}
_TURNS: dict[torch.device, Tensor] = {}


def _turns(weight: "PackedLow") -> Tensor:
    if weight.words.device not in _TURNS:
        _TURNS[weight.words.device] = torch.zeros(1 << 16, dtype=torch.int32, device=weight.words.device)
    return _TURNS[weight.words.device]


@functools.cache
def _twice(value: float, dtype: torch.dtype) -> int:
    """A number in both halves of a register."""
    return int(torch.tensor([value, value], dtype=dtype).view(torch.int32))
