"""Greedy MAP of a DPP, a program a clip: what is left of each token in registers, the Cholesky factor a few picks at a time.

Shapes: B clips, N tokens, D width, T picks of a block.

As pivoted Cholesky is done in blocks: within a block of picks a program reads the rows of the factor that the block has made, and
between blocks their product leaves the matrix of cosines, on tensor cores. A pick thus never reads more than T rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dpp import NOTHING, prepare

BLOCK_PICKS = 64
TILE = 128


@triton.jit
def _outer(
    a, scale, out, counts, keep, reach, width, done, sa_b, sa_n, sa_d, so_b, so_n, ss_b,
    MINUS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens = tl.load(counts + b)
    # symmetric: each tile above the diagonal is stored twice
    if (j < i) | (j * TILE >= tokens) | (tl.load(keep + b) <= done):
        return
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    row_ok, column_ok = rows < tokens, columns < tokens
    row_in, column_in = row_ok, column_ok
    if MINUS:  # tokens are beside each other: a bound that is a multiple of 16, so that loads are wide; what lies between is not stored
        row_in, column_in = rows < reach, columns < reach
    a += b * sa_b
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, width, BK):
        d = start + tl.arange(0, BK)
        x = tl.load(a + rows[:, None] * sa_n + d[None, :] * sa_d, row_in[:, None] & (d < width)[None, :], 0.0)  # [TILE, BK]
        y = tl.load(a + columns[None, :] * sa_n + d[:, None] * sa_d, (d < width)[:, None] & column_in[None, :], 0.0)  # [BK, TILE]
        if WIDE:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision="tf32x3")
    out += b * so_b
    ok = row_ok[:, None] & column_ok[None, :]
    at = out + rows[:, None] * so_n + columns[None, :]
    if MINUS:
        total = tl.load(at, ok, 0.0) - total
    else:
        total *= tl.load(scale + b * ss_b + rows, row_ok, 0.0)[:, None] * tl.load(scale + b * ss_b + columns, column_ok, 0.0)[None, :]
    tl.store(at, total, ok)
    if j > i:
        tl.store(out + columns[:, None] * so_n + rows[None, :], tl.trans(total), column_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["first", "last"])
def _pick(
    gram, factor, left, relevance, picks, keep, first, last, tokens, sg_b, sf_b, stride, ss_b, sp_b,
    NOTHING: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    # rows are padded to a multiple of 16, so that loads are wide; v tells what is no token
    ok = n < stride
    gram += b * sg_b
    factor += b * sf_b
    v = tl.load(left + b * ss_b + n, n < tokens, -1.0)
    r = tl.load(relevance + b * ss_b + n, n < tokens, 0.0)
    end = tl.minimum(last, tl.load(keep + b).to(tl.int32))
    for t in range(first, end):
        top, j = tl.max(tl.where(v > NOTHING, r * r * v, -1.0), 0, return_indices=True, return_indices_tie_break_left=True)
        differs = top > 0
        if top <= 0:
            _, j = tl.max(tl.where(v < 0, -1.0, r), 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(picks + b * sp_b + t, j.to(tl.int64))
        rest = tl.load(gram + j.to(tl.int64) * stride + n, ok, 0.0)
        of_pick = tl.load(relevance + b * ss_b + j)
        for start in range(0, t - first, BT):
            rows = start + tl.arange(0, BT)
            made = rows < t - first
            c = tl.load(factor + rows * stride + j, made, 0.0)
            tile = tl.load(factor + rows[:, None] * stride + n[None, :], made[:, None] & ok[None, :], 0.0)  # [BT, BN]
            rest -= tl.sum(tile * c[:, None], 0)
        e = tl.where(differs, rest * tl.rsqrt(tl.maximum(top / (of_pick * of_pick), NOTHING)), 0.0)
        tl.store(factor + (t - first) * stride + n, e, ok)
        v = tl.where(v < 0, v, tl.maximum(v - e * e, 0.0))
        v = tl.where(n == j, -1.0, v)
        # the next pick reads what other threads have written
        tl.debug_barrier()
    tl.store(left + b * ss_b + n, v, n < tokens)


def dpp(features: Tensor, relevance: Tensor, keep: Tensor, counts: Tensor, most: int) -> Tensor:
    """As the reference."""
    clips, tokens, width = features.shape
    picks = torch.full((clips, most), -1, device=features.device)
    if not most:
        return picks
    scale, r, left = (x.contiguous() for x in prepare(features, relevance, counts))
    stride = -(-tokens // 16) * 16
    gram = torch.zeros(clips, tokens, stride, device=features.device)
    factor = torch.zeros(clips, BLOCK_PICKS, stride, device=features.device)
    tiles = -(-tokens // TILE)
    wide = not features.is_cuda and features.dtype != torch.float32  # the interpreter multiplies BF16's bits as whole numbers
    columns = max(256, triton.next_power_of_2(tokens))  # fewer variants to compile
    warps = 8 if columns <= 1024 else 16
    options = {"NOTHING": NOTHING, "BN": columns, "BT": max(1, min(16, 64 * 32 * warps // columns)), "num_warps": warps}
    products = {"TILE": TILE, "BK": 32, "num_warps": 8, "num_stages": 3}
    with torch.cuda.device_of(features):
        _outer[(tiles, tiles, clips)](
            features, scale, gram, counts, keep, tokens, width, 0, *features.stride(), *gram.stride()[:2], tokens, MINUS=False, WIDE=wide, **products
        )
        for first in range(0, most, BLOCK_PICKS):
            _pick[(clips,)](
                gram, factor, left, r, picks, keep, first, min(first + BLOCK_PICKS, most), tokens,
                gram.stride(0), factor.stride(0), stride, tokens, most, **options,
            )  # fmt: skip
            done = first + BLOCK_PICKS
            if done < most:
                _outer[(tiles, tiles, clips)](
                    factor, scale, gram, counts, keep, stride, BLOCK_PICKS, done, factor.stride(0), 1, stride, *gram.stride()[:2], tokens,
                    MINUS=True, WIDE=False, **products,
                )  # fmt: skip
    return picks
