"""Estimated attention of blocks, without N x N scores in memory: what a block's row comes to is all that is written."""

import math
from importlib.util import find_spec
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...prefill import Prefill

# bytes of rows' sums that are kept at a time
MEMORY = 2**28
# a block within this of a row's highest score owns its maximum
OWNS = tl.constexpr(0.999)


class Tiles(NamedTuple):
    """How antidiagonals are multiplied; none of it changes what comes out beyond rounding.

    Args:
        rows, columns: groups of queries and of keys of a program.
        width: of queries and keys that are multiplied at a time, at most.
        warps, stages: of a program; stages are tiles on their way.
        beside: tiles of queries that meet the same keys side by side, so that both stay in the L2 cache.
        tma: whether whole tiles come by the tensor memory accelerator, where it is there and their layout allows it.
        warpgroups: of `hopper_mass`, which is used where it `takes` the call; 0: it is not. Rows and warps are not its.
    """

    rows: int = 128
    columns: int = 256
    width: int = 64
    warps: int = 8
    stages: int = 4
    beside: int = 16
    tma: bool = True
    warpgroups: int = 0


CONFIGS = {
    "hopper": Tiles(warpgroups=2),
    "hopper, 3 warpgroups": Tiles(stages=3, warpgroups=3),
    "tma": Tiles(stages=3),
    "pointers": Tiles(stages=3, tma=False),
}
FASTEST = "hopper"
# where there is no TMA; shared memory of an A100 holds its tiles
PLAIN = CONFIGS["pointers"]
# FP32 has no tensor cores: a wide tile is more than the registers hold
EXACT = Tiles(64, 64, 64, 4, 3, 16, False)


@triton.jit(do_not_specialize=["row", "groups", "columns", "q_len", "kv_len", "off", "row_tiles", "column_tiles"])
def _antidiagonal(
    q, k, q_box, k_box, out, row, groups, columns, q_len, kv_len, off, width, factor, qs_h, qs_t, ks_h, ks_t, row_tiles, column_tiles,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr, HIGHEST: tl.constexpr, BESIDE: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # KV head by KV head; of its queries, BESIDE rows of tiles after the other, by columns
    of_head = GROUP * row_tiles * column_tiles
    kv, item = tl.program_id(0) // of_head, tl.program_id(0) % of_head
    top = item // (GROUP * BESIDE * column_tiles) * BESIDE
    item -= GROUP * top * column_tiles
    side = GROUP * tl.minimum(BESIDE, row_tiles - top)
    h, m, n = kv * GROUP + item % GROUP, (top + item % side // GROUP) * BM, item // side * BN
    here = m + tl.arange(0, BM)
    a, e = row + here, n + tl.arange(0, BN)
    if n * STRIDE <= off + (row + m + BM) * STRIDE - 1:
        x = tl.zeros([BM, BN], tl.float32)
        d = tl.arange(0, BD)
        q_at = q + h.to(tl.int64) * qs_h + (a * STRIDE).to(tl.int64)[:, None] * qs_t + d[None, :]
        k_at = k + kv.to(tl.int64) * ks_h + (e * STRIDE).to(tl.int64)[:, None] * ks_t + d[None, :]
        if TMA and ((row + m + BM) * STRIDE <= q_len) & ((n + BN) * STRIDE <= kv_len):
            for i in range(STRIDE * STEPS):
                t, first = i // STEPS, i % STEPS * BD
                qx = q_box.load([h, STRIDE - 1 - t, row + m, first]).reshape(BM, BD)
                kx = k_box.load([kv, t, n, first]).reshape(BN, BD)
                x = tl.dot(qx, tl.trans(kx), x, input_precision=PRECISION)
        else:
            for i in range(STRIDE * STEPS):
                t, first = i // STEPS, i % STEPS * BD
                qp, kp = q_at + ((STRIDE - 1 - t) * qs_t + first), k_at + (t * ks_t + first)
                if WHOLE:
                    qx, kx = tl.load(qp), tl.load(kp)
                else:
                    has = (first + d < width)[None, :]
                    qx = tl.load(qp, (a * STRIDE + (STRIDE - 1 - t) < q_len)[:, None] & has, 0.0)
                    kx = tl.load(kp, (e * STRIDE + t < kv_len)[:, None] & has, 0.0)
                x = tl.dot(qx, tl.trans(kx), x, input_precision=PRECISION)
        x *= factor
        if ((n + BN - 1) * STRIDE >= kv_len) | ((n + BN - 1) * STRIDE > off + (row + m + 1) * STRIDE - 1):
            x = tl.where((e[None, :] * STRIDE <= (off + (a + 1) * STRIDE - 1)[:, None]) & (e * STRIDE < kv_len)[None, :], x, float("-inf"))
        if HIGHEST:
            found = tl.max(tl.reshape(x, [BM, BN // PARTS, PARTS]), 2)
        else:
            # by the highest of the row's keys here: what vanishes beside it does so in the row
            highest = tl.max(x, 1)
            safe = tl.where(highest > float("-inf"), highest, 0.0)[:, None]
            found = tl.log2(tl.sum(tl.reshape(tl.exp2(x - safe), [BM, BN // PARTS, PARTS]), 2)) + safe
        j = n // PARTS + tl.arange(0, BN // PARTS)
        tl.store(out + (h.to(tl.int64) * groups + here)[:, None] * columns + j[None, :], found, (here < groups)[:, None] & (j < columns)[None, :])


@triton.jit
def _mass(
    parts, out, row, groups, columns, q_len, off, os_h, os_r,
    STRIDE: tl.constexpr, PARTS: tl.constexpr, OWNERS: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # parts: of each group of queries and block of keys, the highest score (OWNERS) or the logarithm of the sum, base 2
    i, h = tl.program_id(0), tl.program_id(1)
    r, c = tl.arange(0, PARTS), tl.arange(0, BC)
    block = row // PARTS + i
    last = (off + tl.minimum((block + 1) * BLOCK, q_len) - 1) // BLOCK
    real = (block * PARTS + r) * STRIDE < q_len
    at = parts + (h.to(tl.int64) * groups + i * PARTS + r)[:, None] * columns
    highest = tl.full([PARTS], float("-inf"), tl.float32)
    total = tl.zeros([PARTS], tl.float32)
    for start in range(0, last + 1, BC):
        x = tl.load(at + (start + c)[None, :], real[:, None] & (start + c <= last)[None, :], float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 1))
        safe = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp2(highest - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        highest = higher
    whole = tl.where(real, highest, 0.0)
    if not OWNERS:
        whole += tl.where(real, tl.log2(total), 0.0)
    for start in range(0, last + 1, BC):
        x = tl.load(at + (start + c)[None, :], real[:, None] & (start + c <= last)[None, :], float("-inf"))
        share = tl.exp2(x - whole[:, None])
        mass = tl.sum(share, 0)
        if OWNERS:
            mass = tl.where(tl.max(share, 0) >= OWNS, -mass, mass)
        tl.store(out + h.to(tl.int64) * os_h + block.to(tl.int64) * os_r + start + c, mass, start + c <= last)


@triton.jit
def _mean_key(
    q, k, out, rows, columns, q_len, kv_len, off, width, factor, qs_h, qs_t,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, h = tl.program_id(0), tl.program_id(1)
    token, n, d = i * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BN), tl.arange(0, BD)
    has = d[None, :] < width
    last = (off + tl.minimum((i + 1) * BLOCK, q_len) - 1) // BLOCK
    qx = tl.load(q + h.to(tl.int64) * qs_h + token.to(tl.int64)[:, None] * qs_t + d[None, :], (token < q_len)[:, None] & has, 0.0)
    k += (h // GROUP).to(tl.int64) * columns * width
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, last + 1, BN):
        j = start + n
        x = tl.dot(qx, tl.trans(tl.load(k + j[:, None] * width + d[None, :], (j < columns)[:, None] & has, 0.0)), input_precision=PRECISION) * factor
        seen = (tl.minimum((j + 1) * BLOCK, kv_len) - 1)[None, :] <= (off + token)[:, None]
        highest = tl.maximum(highest, tl.max(tl.where(seen & (token < q_len)[:, None], x, float("-inf")), 1))
    top = tl.max(highest, 0)
    top = tl.where(top > float("-inf"), top, 0.0)
    for start in range(0, last + 1, BN):
        j = start + n
        x = tl.dot(qx, tl.trans(tl.load(k + j[:, None] * width + d[None, :], (j < columns)[:, None] & has, 0.0)), input_precision=PRECISION) * factor
        seen = (tl.minimum((j + 1) * BLOCK, kv_len) - 1)[None, :] <= (off + token)[:, None]
        mass = tl.sum(tl.exp2(tl.where(seen & (token < q_len)[:, None], x - top, float("-inf"))), 0)
        tl.store(out + (h.to(tl.int64) * rows + i) * columns + j, mass, j <= last)


def _inputs(s: Prefill) -> tuple[Tensor, Tensor, str]:
    """Queries and keys as the kernels take them, and the precision of their products."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (s.q, s.k))
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # the interpreter multiplies BF16's bits as whole numbers
        q, k = q.float(), k.float()
    return q, k, "ieee" if q.dtype == torch.float32 else "tf32"


def strided(x: Tensor, stride: int) -> tuple[list[int], list[int]]:
    """Shape and strides of [H, T, D] as [H, stride, whole groups, D]: of each group, the token of one place."""
    heads, tokens, width = x.shape
    return [heads, stride, max(1, tokens // stride), width], [x.stride(0), x.stride(1), x.stride(1) * stride, 1]


def _has_boxes(q: Tensor, k: Tensor) -> bool:
    """Whether TMA is there and takes this layout: everything a multiple of 16 bytes."""
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 9:
        return False
    return all(x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2]) for x in (q, k))


def _on_hopper(q: Tensor, k: Tensor, stride: int, parts: int, tiles: Tiles) -> bool:
    """Whether `hopper_mass` computes the call: whole groups of 16-bit tokens, and blocks that a warpgroup holds."""
    return (
        tiles.warpgroups > 0
        and q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype != torch.float32
        and (q.shape[1] % stride, k.shape[1] % stride, q.shape[2] % tiles.width) == (0, 0, 0)
        and parts <= 64
        and find_spec("triton.experimental") is not None
        and find_spec("triton.experimental.gluon") is not None
    )


def antidiagonal_mass(s: Prefill, stride: int, owners: bool, tiles: Tiles | None = None) -> Tensor:
    """As the reference, but for what comes after a row's last position: that holds anything."""
    q, k, precision = _inputs(s)
    tiles = tiles or (EXACT if q.dtype == torch.float32 else CONFIGS[FASTEST])
    if tiles.tma and not _has_boxes(q, k):
        tiles = PLAIN
    heads, _, width = q.shape
    groups, parts = s.groups, s.block // stride
    # a block is within a tile, so that all of its rows have the same columns written
    tile_m, tile_n, tile_d = max(tiles.rows, parts), max(tiles.columns, parts), min(tiles.width, max(16, triton.next_power_of_2(width)))
    out = torch.empty(heads, s.rows, s.columns, dtype=torch.float32, device=q.device)
    step = max(1, min(s.rows, MEMORY // (4 * heads * parts * s.columns)))
    sums = torch.empty(heads, step * parts, s.columns, dtype=torch.float32, device=q.device)
    boxes = [TensorDescriptor(x, *strided(x, stride), [1, 1, n, tile_d]) if tiles.tma else None for x, n in ((q, tile_m), (k, tile_n))]
    whole = not tiles.tma and (s.q_len % (stride * tile_m), step * parts % tile_m, s.kv_len % (stride * tile_n), width % tile_d) == (0, 0, 0, 0)
    hopper, factor = tiles.tma and _on_hopper(q, k, stride, parts, tiles), s.scale / stride / math.log(2)
    with torch.cuda.device_of(q):
        for first in range(0, s.rows, step):
            rows = min(step, s.rows - first)
            seen = min(s.kv_len, s.off + (first + rows) * s.block)
            if hopper:
                from .hopper_mass import antidiagonal

                antidiagonal(
                    q, k, sums, first * parts, rows * parts, s.columns, seen, s.kv_len, s.off, factor, stride, parts, owners,
                    tile_n, tile_d, tiles.warpgroups, tiles.stages, tiles.beside,
                )  # fmt: skip
            else:
                row_tiles, column_tiles = triton.cdiv(rows * parts, tile_m), triton.cdiv(seen, stride * tile_n)
                _antidiagonal[(heads * row_tiles * column_tiles,)](
                    q, k, *boxes, sums, first * parts, step * parts, s.columns, s.q_len, s.kv_len, s.off, width, factor,
                    *q.stride()[:2], *k.stride()[:2], row_tiles, column_tiles, GROUP=groups, STRIDE=stride, PARTS=parts, HIGHEST=owners,
                    BESIDE=max(1, tiles.beside // groups), TMA=tiles.tma, BM=tile_m, BN=tile_n, BD=tile_d, STEPS=triton.cdiv(width, tile_d),
                    WHOLE=whole, PRECISION=precision, num_warps=tiles.warps, num_stages=tiles.stages,
                )  # fmt: skip
            _mass[(rows, heads)](
                sums, out, first * parts, step * parts, s.columns, s.q_len, s.off, *out.stride()[:2],
                STRIDE=stride, PARTS=parts, OWNERS=owners, BLOCK=s.block, BC=max(16, 2048 // parts), num_warps=4,
            )  # fmt: skip
    return out


def mean_key_mass(s: Prefill, mean: Tensor) -> Tensor:
    """As the reference, of mean keys [Hkv, Pk, D] in the keys' dtype, but for what comes after a row's last position: that holds anything."""
    q, _, precision = _inputs(s)
    heads, _, width = q.shape
    wide = max(16, triton.next_power_of_2(width))
    out = torch.empty(heads, s.rows, s.columns, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _mean_key[(s.rows, heads)](
            q, mean.to(q.dtype), out, s.rows, s.columns, s.q_len, s.kv_len, s.off, width, s.scale / math.log(2), *q.stride()[:2],
            GROUP=s.groups, BLOCK=s.block, BN=64, BD=wide, PRECISION=precision, num_warps=8 if s.block == 128 else 4, num_stages=2,
        )  # fmt: skip
    return out
