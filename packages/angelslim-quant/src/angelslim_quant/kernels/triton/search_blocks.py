"""`search_blocks` as one program for some blocks: they are read once and stay in registers while their scales are tried."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from angelslim_core.schemes import Grid

from .rounding import divided, e2m1_index, e4m3_byte, e4m3_value, nearest

# weights a program
WEIGHTS = 2048


@triton.jit
def _step(code, t, NESTED: tl.constexpr):
    if NESTED:
        return e4m3_value(code) * t
    else:
        return (code << 23).to(tl.float32, bitcast=True)


@triton.jit
def _kernel(
    weight, importance, global_scale, codes, scales, blocks, per_row,
    NESTED: tl.constexpr, WEIGHTED: tl.constexpr, FP4: tl.constexpr, UP: tl.constexpr, OFFSETS: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    LEAST: tl.constexpr = 1.0 if FP4 else 0.015625
    MOST: tl.constexpr = 4.0 if FP4 else 256.0
    PART: tl.constexpr = 0.5 if FP4 else 0.125
    LARGEST: tl.constexpr = 6.0 if FP4 else 448.0
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    inside = block < blocks
    j = tl.arange(0, SIZE)
    place = tl.arange(0, BLOCKS)[:, None] * SIZE + j[None, :]
    w = tl.load(weight + first * SIZE + place, inside[:, None], 0.0).to(tl.float32)
    size = tl.abs(w)
    amax = tl.max(size, 1)
    bits = amax.to(tl.int32, bitcast=True)
    if NESTED:
        t = tl.load(global_scale)
        start = e4m3_byte(nearest(divided(divided(amax, 6.0), t), 0.015625, 256.0, 0.125, 448.0))
    else:
        # largest values are 1.5 * 2^2 and 1.75 * 2^8: the exponent's difference, one more where amax has a larger mantissa
        t = 1.0
        start = (bits >> 23) - (2 if FP4 else 8)
        if UP:
            start += tl.where((bits & 0x7FFFFF) > (0x400000 if FP4 else 0x600000), 1, 0)
        start = tl.where(amax > 0, tl.minimum(tl.maximum(start, 1), 254), 127)
    if WEIGHTED:
        counts = tl.load(importance + (block % per_row).to(tl.int32)[:, None] * SIZE + j[None, :], inside[:, None], 0.0)
    chosen = tl.zeros_like(start)
    best = tl.zeros_like(amax)
    for n in tl.static_range(COUNT):
        # four bits an offset, plus 8
        offset = ((OFFSETS >> (4 * n)) & 15) - 8
        code = tl.minimum(tl.maximum(start + offset, 1), 126 if NESTED else 254)
        code = tl.where(amax > 0, code, 56 if NESTED else 127)
        if COUNT == 1:
            chosen = code
        else:
            step = _step(code, t, NESTED)[:, None] + tl.zeros_like(size)
            error = nearest(tl.div_rn(size, step), LEAST, MOST, PART, LARGEST) * step - size
            error = error * error
            if WEIGHTED:
                error = error * counts
            found = tl.sum(error, 1)
            if n == 0:
                best = found
                chosen = code
            else:
                better = found < best
                best = tl.where(better, found, best)
                chosen = tl.where(better, code, chosen)
    tl.store(scales + block, chosen.to(tl.uint8), inside)
    step = _step(chosen, t, NESTED)[:, None] + tl.zeros_like(size)
    level = nearest(tl.div_rn(size, step), LEAST, MOST, PART, LARGEST)
    if FP4:
        code = e2m1_index(level) | tl.where((w < 0) & (level > 0), 8, 0)
    else:
        code = e4m3_byte(level) | ((w.to(tl.int32, bitcast=True) >> 24) & 0x80)
    tl.store(codes + first * SIZE + place, code.to(tl.uint8), inside[:, None])


def search_blocks(
    weight_OI: Tensor, grid: Grid, global_scale: Tensor | None, importance_I: Tensor | None, offsets: Sequence[int], rounding: str
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    outputs, inputs = weight_OI.shape
    size = grid.group_size
    assert size and all(-8 <= offset < 8 for offset in offsets)
    weight_OI = weight_OI.contiguous()
    codes = torch.empty(outputs, inputs, dtype=torch.uint8, device=weight_OI.device)
    scales = torch.empty(outputs, inputs // size, dtype=torch.uint8, device=weight_OI.device)
    blocks = scales.numel()
    _kernel[(triton.cdiv(blocks, WEIGHTS // size),)](
        weight_OI, weight_OI if importance_I is None else importance_I.float().contiguous(), weight_OI if global_scale is None else global_scale,
        codes, scales, blocks, inputs // size,
        NESTED=global_scale is not None, WEIGHTED=importance_I is not None, FP4=grid.bits == 4, UP=rounding == "up",
        OFFSETS=sum((offset + 8) << (4 * n) for n, offset in enumerate(offsets)), COUNT=len(offsets), SIZE=size, BLOCKS=WEIGHTS // size,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return (codes if grid.bits == 4 else codes.view(torch.float8_e4m3fn)), (scales if global_scale is None else scales.view(torch.float8_e4m3fn))
