"""Weights of at most four levels on tensor cores, for few rows: decoding. Many rows are cuBLAS's, on a weight widened for one call.

As INT4's kernel, with half the bytes: what counts is instructions a code, and none of them waiting for memory. A pair of codes becomes
a register of mma.sync.m16n8k16 by one mask-and-or, with half a turn of the word for it: two bits of a mantissa read as 4 or 16 more than
the code. These, and the zero, are taken off once for all outputs: sums begin with another product, of constants with the inputs.
Five bits are first made two bits of eight words, all 32 of a plane at once. Where there are few steps they are written out, so that
addresses are constants, and the first few steps' weights are asked for before anything else.
"""
# ruff: noqa: RUF005  (Triton compiles no unpacking)
# mypy: disable-error-code="assignment, misc"

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .lowbit_sums import number, sums, totals, turned

if TYPE_CHECKING:
    from ..lowbit_matmul import PackedLow

# rows of a product of mma.sync
ROWS = 8


class Shape(NamedTuple):
    """How a product is divided.

    Args:
        warps: of a program.
        wide: warps of these beside one another along the outputs; the others share out the inputs.
        ahead: inputs are read a step before they are needed, which takes registers.
        deep: steps that weights are read ahead.
        written: as many steps are written out one after another; more are a loop.
        registers: of a thread: left to itself, ptxas takes fewer, and reads weights when they are needed instead of ahead.
    """

    warps: int
    wide: int = 1
    registers: int = 128
    ahead: bool = True
    deep: int = 2
    written: int = 8


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
def _weights(at, chunk, chunks, here, SPARSE: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr):
    """Words and scales of each thread's chunk; `at`: where these are in the thread's first chunk."""
    SEGMENTS: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    OF_GROUP: tl.constexpr = 32 if at[2].dtype.element_ty == tl.float32 else 16
    WORDS: tl.constexpr = 160 if SPARSE else 256
    inside = (here + chunk < chunks)[:, None]
    wide, more = at[0] + here * WORDS, at[1] + here * WORDS
    if EVEN:
        words = (tl.load(wide, eviction_policy="evict_first"), tl.load(more, eviction_policy="evict_first"))
    elif SPARSE:
        words = (tl.load(wide, inside, 0), tl.load(more, here + chunk < chunks, 0))
    else:
        words = (tl.load(wide, inside, 0), tl.load(more, inside, 0))
    scales = ()
    if GROUP > 0:
        if GROUP <= 128:
            group = at[2] + here * (OF_GROUP * SEGMENTS)
        else:
            group = at[2] + ((here + chunk) // (GROUP // 128) * OF_GROUP)[:, None]
        for segment in tl.static_range(SEGMENTS):
            if EVEN:
                scales = scales + (tl.load(group + OF_GROUP * segment),)
            else:
                scales = scales + (tl.load(group + OF_GROUP * segment, inside, 0),)
    return words[0], words[1], scales


@triton.jit
def _places(words, scale, tile, chunk, chunks, groups, i, SPARSE: tl.constexpr, GROUP: tl.constexpr):
    """`at` of `_weights`."""
    lane, four = i % 32, tl.arange(0, 4)[None, :]
    first = words + (tile * chunks + chunk) * (160 if SPARSE else 256)
    group = tile * groups
    if GROUP > 0 and GROUP <= 128:
        group += chunk * (128 // GROUP)
    if scale.dtype.element_ty == tl.float32:
        scales = scale + (group * 32 + lane // 4 * 4)[:, None] + four
    else:  # two at a time: ptxas moves 16 bits out of a register as soon as they are there, and waits for that before it asks for more
        scales = scale.to(tl.pointer_type(tl.int32)) + (group * 16 + lane // 4 * 2)[:, None] + tl.arange(0, 2)[None, :]
    if SPARSE:
        return ((first + lane * 4)[:, None] + four, first + 128 + lane, scales)
    else:
        return ((first + lane * 4)[:, None] + four, (first + 128 + lane * 4)[:, None] + four, scales)


@triton.jit
def scales_of(loaded, scale, BW: tl.constexpr):
    """Scales of a thread's four outputs, in fp32."""
    if scale.dtype.element_ty == tl.float32:
        return columns(loaded, BW)
    else:
        HALF: tl.constexpr = "bf16" if scale.dtype.element_ty == tl.bfloat16 else "fp16"
        a, b = tl.split(loaded)
        return number(a, False, HALF), number(a, True, HALF), number(b, False, HALF), number(b, True, HALF)


@triton.jit
def _inputs(at, column, inputs, here, FULL: tl.constexpr):
    """Inputs of each thread's chunk, four times [BW, 4] registers of two for each of its rows, which begin at `at`."""
    found = ()
    for p in tl.static_range(len(at)):
        for part in tl.static_range(4):
            if FULL:
                found = found + (tl.load(at[p] + (here * 64 + 16 * part)),)
            else:
                found = found + (tl.load(at[p] + (here * 64 + 16 * part), (here * 128 + column + 32 * part < inputs)[:, None], 0),)
    return found


@triton.jit
def _added(
    y, weights, xs, scale, masks, constants,
    SPARSE: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PASSES: tl.constexpr, ONE: tl.constexpr, PTX: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Adds a chunk to the sums, by tile, pass, and register."""
    first, second, scales = weights
    words = tile_words(first, second, SPARSE, BW)
    SEGMENTS: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    HALVES: tl.constexpr = 1 if SPARSE and SEGMENTS == 2 else 2
    KEPT: tl.constexpr = 2 if ONE else 4
    for segment in tl.static_range(SEGMENTS):
        used = ()
        for p in tl.static_range(PASSES):
            ordered = ()
            for i in tl.static_range(4):
                ordered = ordered + columns(xs[4 * p + i], BW)
            used = used + _part(_ordered(ordered, SPARSE), segment, SEGMENTS, SPARSE)
        one, two = (), ()
        for i in tl.static_range(4):
            if SPARSE or i // (4 // SEGMENTS) == segment:
                one, two = one + (words[0][i],), two + (words[1][i],)
        c = sums(one, two, masks, constants, used, segment if SPARSE else 0, HALVES, HALF, PASSES, ONE, PTX, BW)
        if GROUP > 0:
            s = scales_of(scales[segment], scale, BW)
        new = ()
        for k in tl.static_range(2 * PASSES * KEPT):
            if GROUP > 0:
                new = new + (y[k] + c[k] * s[k // (PASSES * KEPT) * 2 + k % KEPT // (KEPT // 2)],)
            else:
                new = new + (y[k] + c[k],)
        y = new
    return y


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x, words, scale, bias, out, rows, outputs, inputs, row, chunks, groups, high, high_8, low, low_8, mask_high, mask_low,
    SPARSE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr,
    ONE: tl.constexpr, PASSES: tl.constexpr, WARPS: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr, DEEP: tl.constexpr, STEPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    BW: tl.constexpr = 32 * WARPS
    STEP: tl.constexpr = WARPS // WIDE
    KEPT: tl.constexpr = 2 if ONE else 4
    EACH: tl.constexpr = 32 if ONE else 256
    i = tl.arange(0, BW)
    tile = tl.program_id(0) * WIDE + i // 32 % WIDE
    n0 = tl.program_id(1) * 8 * PASSES
    chunk = i // 32 // WIDE
    column = chunk * 128
    at = _places(words, scale, tile, chunk, chunks, groups, i, SPARSE, GROUP)
    # weights are read some steps ahead, inputs one; after the last chunks, where there are many, these again, or nothing
    last = chunks - STEP
    queue = ()
    for k in tl.static_range(DEEP if STEPS == 0 or DEEP < STEPS else STEPS):
        here = tl.minimum(k * STEP, last) if EVEN and STEPS == 0 else k * STEP
        queue = queue + (_weights(at, chunk, chunks, here, SPARSE, EVEN, GROUP),)
    tl.debug_barrier()  # or ptxas asks for inputs first, which are nearer
    if EARLY:  # no kernel before it writes weights, so that these are under way when it ends; what follows needs what it wrote
        gdc_launch_dependents()
        gdc_wait()
    # a row is given to all columns of the product, and the last one to those that have none: their sums are not stored
    x_at = ()
    for p in tl.static_range(PASSES):
        n = i * 0 if ONE else tl.minimum(n0 + 8 * p + i % 32 // 4, rows - 1)
        x_at = x_at + (x + (n * row + chunk * 64 + i % 4 * 4)[:, None] + tl.arange(0, 4)[None, :],)
    xs = ()
    if AHEAD:
        xs = _inputs(x_at, column, inputs, 0, FULL)
    zero = tl.zeros([BW], tl.int32)
    masks = (zero + mask_high, zero + mask_low)
    constants = (zero + high, zero + high_8, zero + low, zero + low_8)  # ptxas copies equal ones each time
    y = ()
    for _ in tl.static_range(2 * PASSES * KEPT):
        y = y + (tl.zeros([BW], tl.float32),)
    if STEPS > 0:
        for k in tl.static_range(STEPS):
            if k + DEEP < STEPS:
                queue = queue + (_weights(at, chunk, chunks, (k + DEEP) * STEP, SPARSE, EVEN, GROUP),)
            used = xs if AHEAD else _inputs(x_at, column, inputs, k * STEP, FULL)
            if AHEAD and k + 1 < STEPS:
                xs = _inputs(x_at, column, inputs, (k + 1) * STEP, FULL)
            y = _added(y, queue[k], used, scale, masks, constants, SPARSE, GROUP, HALF, PASSES, ONE, PTX, BW)
    else:
        for start in tl.range(0, chunks, STEP, loop_unroll_factor=DEEP):
            one, far = start + STEP, start + DEEP * STEP
            if EVEN:
                one, far = tl.minimum(one, last), tl.minimum(far, last)
            after = _weights(at, chunk, chunks, far, SPARSE, EVEN, GROUP)
            next_x = _inputs(x_at, column, inputs, one if AHEAD else start, FULL)
            y = _added(y, queue[0], xs if AHEAD else next_x, scale, masks, constants, SPARSE, GROUP, HALF, PASSES, ONE, PTX, BW)
            moved = ()
            for k in tl.static_range(1, DEEP):
                moved = moved + (queue[k],)
            queue = moved + (after,)
            if AHEAD:
                xs = next_x
    if GROUP == 0:
        s = scales_of(tl.load(at[2]), scale, BW)
        new = ()
        for k in tl.static_range(2 * PASSES * KEPT):
            new = new + (y[k] * s[k // (PASSES * KEPT) * 2 + k % KEPT // (KEPT // 2)],)
        y = new
    for p in tl.static_range(PASSES):
        own = ()
        for k in tl.static_range(2 * KEPT):
            own = own + (y[k // KEPT * PASSES * KEPT + KEPT * p + k % KEPT],)
        total = totals(own, i, EACH, WIDE, STEP, PTX)
        for j in tl.static_range(len(total)):
            f = i + BW * j
            if ONE:
                o, n = f // 32 * 32 + f % 4 * 8 + f // 4 % 8, f * 0
            else:
                o, n = f // 256 * 32 + f // 128 % 2 * 16 + f // 2 % 2 * 8 + f // 16 % 8, n0 + 8 * p + f // 4 % 4 * 2 + f % 2
            o += tl.program_id(0) * WIDE * 32
            real = (f < WIDE * EACH) & (n < rows)
            value = total[j]
            if BIAS:
                value += tl.load(bias + o, real, 0.0).to(tl.float32)
            tl.store(out + n * outputs + o, value.to(out.dtype.element_ty), real)


# where outputs give some 130 multiprocessors one program or two, of many inputs or few; and where more: for one row, for up to 8, and for more
LONG, SHORT = Shape(16, ahead=False), Shape(16, deep=1)
MANY_1, MANY = Shape(8, ahead=False, deep=1, written=14), Shape(4, deep=3)
FEW_16, MANY_16 = Shape(8, registers=168), Shape(4, ahead=False, deep=1)
SHAPES = (LONG, SHORT, MANY_1, MANY, FEW_16, MANY_16)


def shape(rows: int, tiles: int, chunks: int) -> Shape:
    """How a product is divided, as `benchmarks/lowbit_gpu.py --tune few,many` found on an H200."""
    few = tiles < 264 and chunks >= 16
    if rows > ROWS:
        return FEW_16 if few else MANY_16
    if few:
        return LONG if chunks > 64 else SHORT
    return MANY_1 if rows == 1 else MANY


def matmul(
    x_NI: Tensor, weight: "PackedLow", bias: Tensor | None, dtype: torch.dtype, divided: Shape | None = None, ptx: bool = True, early: bool = True
) -> Tensor:
    """As the reference.

    Args:
        weight: written by no kernel that may still run: from Hopper on it is read while the kernel before this one ends.
        divided: instead of what its shape gets, for tuning.
        ptx: False: the same sums as definition, for Triton's interpreter; compiling them takes minutes.
        early: False: begins when the kernel before it has ended, as anywhere before Hopper.
    """
    rows, tiles, chunks = x_NI.shape[0], weight.words.shape[0], weight.chunks
    warps, wide, registers, ahead, deep, written = divided or shape(rows, tiles, chunks)
    half, passes = "bf16" if dtype == torch.bfloat16 else "fp16", 1 if rows <= ROWS else 2
    x = x_NI.to(dtype).reshape(-1)
    x = x.clone() if x.storage_offset() % 2 else x  # two numbers are read at a time
    y = torch.empty(rows, weight.outputs, dtype=dtype, device=x.device)
    high, low = (_twice(-at - weight.zero, dtype) for at in (4, 16))
    even, steps = chunks % (warps // wide) == 0, -(-chunks // (warps // wide))
    early = early and ptx and launches_early(x.device)
    _kernel[(tiles // wide, triton.cdiv(rows, ROWS * passes))](
        x.view(torch.int32), weight.words, weight.scale, weight.scale if bias is None else bias, y,
        rows, weight.outputs, weight.inputs, weight.inputs // 2, chunks, weight.scale.shape[1], high, high, low, low, *_MASKS[half],
        SPARSE=weight.sparse, BIAS=bias is not None, EVEN=even, FULL=even and weight.inputs % 128 == 0, GROUP=weight.group,
        HALF=half, PTX=ptx, ONE=rows == 1, PASSES=passes, WARPS=warps, WIDE=wide, AHEAD=ahead, DEEP=deep, STEPS=steps if steps <= written // (passes if weight.sparse else 1) else 0,
        EARLY=early, num_warps=warps, maxnreg=registers, launch_pdl=early,
    )  # fmt: skip
    return y


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether it has programmatic dependent launches."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


# of codes in both halves of a word: the upper pair, and the lower
_MASKS = {"bf16": (0x00600060, 0x00180018), "fp16": (0x03000300, 0x00C000C0)}


@functools.cache
def _twice(value: float, dtype: torch.dtype) -> int:
    """A number in both halves of a register."""
    return int(torch.tensor([value, value], dtype=dtype).view(torch.int32))
