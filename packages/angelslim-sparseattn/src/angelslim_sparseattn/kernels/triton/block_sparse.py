"""Block-sparse attention: a program for each block of queries of each head, online softmax in base 2."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...block_index import BlockIndex

HOPPER_SHARED_BYTES = 227 * 1024


@triton.jit
def _update(
    q, k_at, v_at, m, total, acc, scale_log2, k_mask, v_mask, allowed, limit, counts,
    FULL_K: tl.constexpr, FULL_V: tl.constexpr, MASK: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # k_mask and v_mask: what of a tile there is; allowed: which scores count; counts: rows that have a say in skipping
    k = tl.load(k_at) if FULL_K else tl.load(k_at, k_mask, 0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        s = tl.where(allowed, s, float("-inf"))
    highest = tl.max(s, 1) * scale_log2
    needed = True
    if SKIP:
        needed = tl.max(tl.where(counts, highest - m, float("-inf")), 0) >= limit
    if needed:
        m2 = tl.maximum(m, highest)
        a = tl.exp2(m - m2)
        p = tl.exp2(s * scale_log2 - m2[:, None])
        total = total * a + tl.sum(p, 1)
        v = tl.load(v_at) if FULL_V else tl.load(v_at, v_mask, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * a[:, None], input_precision=PRECISION)
        m = m2
    return m, total, acc


@triton.jit
def _kernel(
    q, k, v, out, lse, launch, row_ptr, col, token_ptr, token, q_lens, kv_lens, limits, scale_log2, heads, queries, rows, width, v_width,
    qs_b, qs_h, qs_t, ks_b, ks_h, ks_t, vs_b, vs_h, vs_t,
    GROUP: tl.constexpr, LISTS_SHARE: tl.constexpr, OWN_FIRST: tl.constexpr, SKIP: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, FULL_D: tl.constexpr, FULL_V: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BN // TN
    program = tl.load(launch + tl.program_id(0))
    i, bh = program % rows, program // rows
    b, h = bh // heads, bh % heads
    row = (bh // LISTS_SHARE) * rows + i
    q_len, kv_len = tl.load(q_lens + b), tl.load(kv_lens + b)
    off = kv_len - q_len
    x = i * BM + tl.arange(0, BM)
    d, e, t = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, TN)
    out_at = out + (bh.to(tl.int64) * queries + x)[:, None] * v_width + e[None, :]
    out_mask = (x[:, None] < queries) & (e[None, :] < v_width)
    lse_at = lse + bh.to(tl.int64) * queries + x
    real = x < q_len
    if i * BM >= q_len:
        tl.store(out_at, tl.zeros([BM, BV], out.dtype.element_ty), out_mask)
        tl.store(lse_at, tl.zeros([BM], tl.float32) - float("inf"), x < queries)
    else:
        k += b.to(tl.int64) * ks_b + (h // GROUP).to(tl.int64) * ks_h
        v += b.to(tl.int64) * vs_b + (h // GROUP).to(tl.int64) * vs_h
        q_at = q + b.to(tl.int64) * qs_b + h.to(tl.int64) * qs_h + x.to(tl.int64)[:, None] * qs_t + d[None, :]
        qx = tl.load(q_at, real[:, None] & (d[None, :] < width), 0.0)
        has_d = d[None, :] < width
        has_e = e[None, :] < v_width
        m = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BV], tl.float32)
        limit = tl.load(limits + b)

        # own blocks first: after the first tile every row has a finite maximum, as it starts no later than any query
        first = (off + i * BM) // BN
        end = off + tl.minimum((i + 1) * BM, q_len)
        for tile in range(first * PARTS, tl.cdiv(end, TN)):
            n = tile * TN + t
            lives = (n < kv_len)[:, None]
            allowed = (n[None, :] <= (off + x)[:, None]) & (n[None, :] < kv_len)
            m, total, acc = _update(
                qx, k + n.to(tl.int64)[:, None] * ks_t + d[None, :], v + n.to(tl.int64)[:, None] * vs_t + e[None, :], m, total, acc, scale_log2,
                lives & has_d, lives & has_e, allowed, limit, real, FULL_K=False, FULL_V=False, MASK=True, SKIP=False, PRECISION=PRECISION,
            )  # fmt: skip

        own = (end - 1) // BN - first + 1
        start, stop = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
        if OWN_FIRST:
            start += own
        else:
            stop -= own
        for at in range(start * PARTS, stop * PARTS):
            n = tl.load(col + at // PARTS).to(tl.int64) * BN + (at % PARTS) * TN + t
            m, total, acc = _update(
                qx, k + n[:, None] * ks_t + d[None, :], v + n[:, None] * vs_t + e[None, :], m, total, acc, scale_log2,
                has_d, has_e, real, limit, real, FULL_K=FULL_D, FULL_V=FULL_V, MASK=False, SKIP=SKIP, PRECISION=PRECISION,
            )  # fmt: skip

        if TOKENS:
            start, stop = tl.load(token_ptr + row), tl.load(token_ptr + row + 1)
            for at in range(start, stop, TN):
                lives = at + t < stop
                n = tl.load(token + at + t, lives, 0).to(tl.int64)
                m, total, acc = _update(
                    qx, k + n[:, None] * ks_t + d[None, :], v + n[:, None] * vs_t + e[None, :], m, total, acc, scale_log2,
                    lives[:, None] & has_d, lives[:, None] & has_e, lives[None, :], limit, real,
                    FULL_K=False, FULL_V=False, MASK=True, SKIP=False, PRECISION=PRECISION,
                )  # fmt: skip

        y = tl.where(real[:, None], acc / total[:, None], 0.0)
        tl.store(out_at, y.to(out.dtype.element_ty), out_mask)
        tl.store(lse_at, tl.where(real, (m + tl.log2(total)) * 0.6931471805599453, float("-inf")), x < queries)


def block_sparse(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # the interpreter multiplies BF16's bits as whole numbers
        wide, lse = block_sparse(q.float(), k.float(), v.float(), index, scale)
        return wide.bfloat16(), lse
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, width = q.shape
    share, v_width = heads // index.shape[1], v.shape[-1]
    out, lse = q.new_empty(batch, heads, queries, v_width), q.new_empty(batch, heads, queries, dtype=torch.float32)
    # the longest lists first, so that no long one is left at the end
    counts = index.row_ptr.diff().view(batch, -1, 1, index.shape[2]).expand(-1, -1, share, -1).flatten()
    launch = counts.argsort(descending=True, stable=True).int()
    skip = index.skip_below()
    limits = torch.tensor([t / math.log(2) for t in skip or [-math.inf] * batch], device=q.device)
    lengths = torch.tensor([index.q_len, index.kv_len], dtype=torch.int32, device=q.device)
    tokens = (index.row_ptr, index.col) if index.tokens is None else index.tokens
    wide_d, wide_v = (max(16, triton.next_power_of_2(n)) for n in (width, v_width))
    # the queries and two tiles of keys and values lie in shared memory
    memory = triton.runtime.driver.active.utils.get_device_properties(q.device.index)["max_shared_mem"] if q.is_cuda else HOPPER_SHARED_BYTES
    keys = (memory - 4096 - index.block_m * wide_d * q.element_size()) // (2 * (wide_d + wide_v) * q.element_size())
    tile = min(index.block_n, triton.next_power_of_2(keys + 1) // 2)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        _kernel[(len(launch),)](
            q, k, v, out, lse, launch, index.row_ptr, index.col, *tokens, *lengths, limits, scale / math.log(2), heads, queries, index.shape[2], width, v_width,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            GROUP=heads // k.shape[1], LISTS_SHARE=share, OWN_FIRST=index.order == "priority", SKIP=skip is not None, TOKENS=index.tokens is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            BM=index.block_m, BN=index.block_n, TN=tile, BD=wide_d, BV=wide_v, FULL_D=wide_d == width, FULL_V=wide_v == v_width,
            num_warps=8 if index.block_m == 128 else 4, num_stages=2,
        )  # fmt: skip
    return out, lse
