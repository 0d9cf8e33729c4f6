"""FP8 and INT8 matrix products with their scales, one kernel: scales of rows are applied at the end, of blocks on the way."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What a program multiplies at a time, and how.

    Args:
        weight_first: the weight is the left factor, of which Hopper's FP8 products want 64 rows; fewer of them are FP16's.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    weight_first: bool = False


ALL = 1 << 30
# the tile for up to so many rows and outputs; the first that fits
LARGE = ((256, ALL, Tile(64, 128, 128, 4, 4)), (ALL, ALL, Tile(128, 256, 128, 8, 3)))
TILES = ((16, ALL, Tile(16, 64, 256, 4, 4)), (64, 16384, Tile(32, 64, 256, 4, 3, weight_first=True)), *LARGE)
FP8_TILES = ((16, ALL, Tile(16, 64, 256, 4, 4, weight_first=True)), (64, 16384, Tile(64, 64, 128, 4, 5, weight_first=True)), *LARGE)
# scales of blocks need a multiply per tile, which wants smaller accumulators
BLOCK_TILES = ((16, ALL, Tile(16, 64, 128, 4, 4)), (64, ALL, Tile(64, 64, 128, 4, 4)), (ALL, ALL, Tile(128, 128, 128, 4, 4)))


@triton.jit
def _kernel(
    x, x_scale, w, w_scale, bias, out, rows, outputs, inputs, xs_row, xs_group, ws_row, ws_group,
    INTEGER: tl.constexpr, BLOCKS: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, STRIP: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):  # fmt: skip
    # programs that run together share rows and outputs in L2
    wide, high = tl.cdiv(outputs, BO), tl.cdiv(rows, BN)
    strip = tl.program_id(0) // (STRIP * wide)
    tall = tl.minimum(high - strip * STRIP, STRIP)
    inner = tl.program_id(0) % (STRIP * wide)
    n = (strip * STRIP + inner % tall) * BN + tl.arange(0, BN)
    o = (inner // tall) * BO + tl.arange(0, BO)
    i = tl.arange(0, BI)
    x_at = x + n[:, None].to(tl.int64) * inputs + i[None, :]
    w_at = w + o[None, :].to(tl.int64) * inputs + i[:, None]
    acc = tl.zeros([BO, BN] if WEIGHT_FIRST else [BN, BO], tl.int32 if INTEGER else tl.float32)
    for start in range(0, inputs, BI):
        a = tl.load(x_at, (n[:, None] < rows) & (i[None, :] < inputs - start), 0.0)
        b = tl.load(w_at, (o[None, :] < outputs) & (i[:, None] < inputs - start), 0.0)
        if WEIGHT_FIRST:
            a, b = tl.trans(b), tl.trans(a)
        if BLOCKS:
            group = start // 128
            s = tl.load(x_scale + n * xs_row + group * xs_group, n < rows, 0.0)
            t = tl.load(w_scale + (o // 128) * ws_row + group * ws_group, o < outputs, 0.0)
            acc += tl.dot(a, b) * (t[:, None] * s[None, :] if WEIGHT_FIRST else s[:, None] * t[None, :])
        elif INTEGER:
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, b, acc)
        x_at += BI
        w_at += BI
    y = (tl.trans(acc) if WEIGHT_FIRST else acc).to(tl.float32)
    if not BLOCKS:
        s = tl.load(x_scale + n * xs_row, n < rows, 0.0)
        t = tl.load(w_scale + o * ws_row, o < outputs, 0.0)
        y = y * s[:, None] * t[None, :]
    if BIAS:
        y += tl.load(bias + o, o < outputs, 0.0).to(tl.float32)[None, :]
    tl.store(out + n[:, None].to(tl.int64) * outputs + o[None, :], y.to(out.dtype.element_ty), (n[:, None] < rows) & (o[None, :] < outputs))


def scaled_matmul(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """As the reference; `tile` instead of the table's, for tuning."""
    (rows, inputs), outputs = x_NI.shape, w_OI.shape[0]
    blocks, integer = w_scale.numel() > 1 and w_scale.shape != (outputs, 1), x_NI.dtype == torch.int8
    if tile is None:
        tile = next(t for most, width, t in (BLOCK_TILES if blocks else TILES if integer else FP8_TILES) if rows <= most and outputs <= width)
    y = torch.empty(rows, outputs, dtype=dtype, device=x_NI.device)
    x_row = 0 if x_scale.numel() == 1 else x_scale.stride(0)
    w_row = 0 if w_scale.numel() == 1 else w_scale.stride(0)
    _kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
        x_NI, x_scale, w_OI, w_scale, y if bias is None else bias, y, rows, outputs, inputs,
        x_row, x_scale.stride(-1) if blocks else 0, w_row, w_scale.stride(-1) if blocks else 0,
        INTEGER=integer, BLOCKS=blocks, BIAS=bias is not None, BN=tile.rows, BO=tile.outputs, BI=tile.inputs, STRIP=8, WEIGHT_FIRST=tile.weight_first,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
