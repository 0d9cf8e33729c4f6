"""Estimated attention of blocks, without N x N scores in memory: what a block's row comes to is all that is written."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...prefill import Prefill

# bytes of rows' sums that are kept at a time
MEMORY = 2**28
# of shared memory for tiles of queries and keys
SHARED = 200 * 1024
# a block within this of a row's highest score owns its maximum
OWNS = tl.constexpr(0.999)


@triton.jit
def _antidiagonal(
    q, k, out, row, groups, columns, q_len, kv_len, off, width, factor, qs_h, qs_t, ks_h, ks_t,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr, HIGHEST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(2)
    here = tl.program_id(1) * BM + tl.arange(0, BM)
    a, e, d = row + here, tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    if tl.program_id(0) * BN * STRIDE <= off + (row + (tl.program_id(1) + 1) * BM) * STRIDE - 1:
        q += h.to(tl.int64) * qs_h
        k += (h // GROUP).to(tl.int64) * ks_h
        has = d[None, :] < width
        x = tl.zeros([BM, BN], tl.float32)
        for t in range(STRIDE):
            at_q, at_k = a * STRIDE + STRIDE - 1 - t, e * STRIDE + t
            qx = tl.load(q + at_q.to(tl.int64)[:, None] * qs_t + d[None, :], (at_q < q_len)[:, None] & has, 0.0)
            kx = tl.load(k + at_k.to(tl.int64)[:, None] * ks_t + d[None, :], (at_k < kv_len)[:, None] & has, 0.0)
            x = tl.dot(qx, tl.trans(kx), x, input_precision=PRECISION)
        seen = (e[None, :] * STRIDE <= (off + (a + 1) * STRIDE - 1)[:, None]) & (e * STRIDE < kv_len)[None, :]
        x = tl.reshape(tl.where(seen, x * factor, float("-inf")), [BM, BN // PARTS, PARTS])
        found = tl.max(x, 2)
        if not HIGHEST:
            safe = tl.where(found > float("-inf"), found, 0.0)
            found += tl.log2(tl.sum(tl.exp2(x - safe[:, :, None]), 2))
        j = tl.program_id(0) * (BN // PARTS) + tl.arange(0, BN // PARTS)
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


def antidiagonal_mass(s: Prefill, stride: int, owners: bool) -> Tensor:
    """As the reference, but for what comes after a row's last position: that holds anything."""
    q, k, precision = _inputs(s)
    heads, _, width = q.shape
    parts, wide = s.block // stride, max(16, triton.next_power_of_2(width))
    out = torch.empty(heads, s.rows, s.columns, dtype=torch.float32, device=q.device)
    step = max(1, min(s.rows, MEMORY // (4 * heads * parts * s.columns)))
    sums = torch.empty(heads, step * parts, s.columns, dtype=torch.float32, device=q.device)
    tile = 128 if wide * q.element_size() <= 256 else 64
    tile_n = max(tile, parts)
    stages = max(1, min(3, SHARED // ((tile + tile_n) * wide * q.element_size())))
    columns = triton.cdiv(triton.cdiv(s.kv_len, stride), tile_n)
    with torch.cuda.device_of(q):
        for first in range(0, s.rows, step):
            rows = min(step, s.rows - first)
            _antidiagonal[(columns, triton.cdiv(rows * parts, tile), heads)](
                q, k, sums, first * parts, step * parts, s.columns, s.q_len, s.kv_len, s.off, width, s.scale / stride / math.log(2),
                *q.stride()[:2], *k.stride()[:2], GROUP=s.groups, STRIDE=stride, PARTS=parts, HIGHEST=owners, BM=tile, BN=tile_n, BD=wide,
                PRECISION=precision, num_warps=8 if tile == 128 else 4, num_stages=stages,
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
