"""What keys receive of attention in two passes over tiles: each row's sum, then each column's; nothing of N x N is written.

Shapes: as in `..received`; BM queries and BN keys of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1 / math.log(2)


@triton.jit
def _bounds(span, b, end, SPAN: tl.constexpr):
    # where a row's places begin and end
    low, high = 0, end
    if SPAN:
        low = tl.load(span + b * 2).to(tl.int32)
        high = tl.minimum(tl.load(span + b * 2 + 1).to(tl.int32), end)
    return low, high


@triton.jit(do_not_specialize=["queries", "keys", "off"])
def _rows(
    q, k, out, span, queries, keys, off, width, factor, qs_b, qs_h, qs_t, ks_b, ks_h, ks_n,
    GROUP: tl.constexpr, SPAN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # logarithms in base 2
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, n, d = tile * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    has = d < width
    low, high = _bounds(span, b, keys, SPAN)
    if CAUSAL:
        high = tl.minimum(high, off + (tile + 1) * BM)
    qx = tl.load(q + b * qs_b + h.to(tl.int64) * qs_h + t.to(tl.int64)[:, None] * qs_t + d[None, :], (t < queries)[:, None] & has[None, :], 0.0)
    k += b * ks_b + (h // GROUP).to(tl.int64) * ks_h
    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(low, high, BN):
        j = start + n
        kx = tl.load(k + j.to(tl.int64)[None, :] * ks_n + d[:, None], (j < high)[None, :] & has[:, None], 0.0)
        x = tl.dot(qx, kx, input_precision=PRECISION) * factor
        seen = (j < high)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= (off + t)[:, None])
        x = tl.where(seen, x, float("-inf"))
        higher = tl.maximum(most, tl.max(x, 1))
        safe = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        most = higher
    heads = tl.num_programs(1)
    # a row that sees nothing has no highest score; of one with NaN the sum is NaN
    tl.store(out + (b * heads + h) * queries + t, tl.where(total == 0, float("-inf"), most + tl.log2(total)), t < queries)


@triton.jit(do_not_specialize=["queries", "keys", "off"])
def _columns(
    q, k, lse, out, span, asking, heads, queries, keys, off, width, factor, qs_b, qs_h, qs_t, ks_b, ks_h, ks_n,
    GROUP: tl.constexpr, SPAN: tl.constexpr, ASKING: tl.constexpr, CAUSAL: tl.constexpr, HIGHEST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # a program sums over the queries of one head, or with HIGHEST over what all heads of a query give at most
    tile, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m, j, d = tl.arange(0, BM), tile * BN + tl.arange(0, BN), tl.arange(0, BD)
    has = d < width
    low, high = _bounds(span, b, keys, SPAN)
    first, last = _bounds(asking, b, off + queries, ASKING)
    first, last = tl.maximum(first - off, 0), last - off  # in queries from here on
    if CAUSAL:
        first = tl.maximum(first, tile * BN - off)
    real = (j >= low) & (j < high)
    if (tile * BN >= high) | ((tile + 1) * BN <= low):  # none of these keys is seen
        last = first
    k_at = k + b * ks_b + j.to(tl.int64)[None, :] * ks_n + d[:, None]
    kept = real[None, :] & has[:, None]
    if not HIGHEST:
        kx = tl.load(k_at + (part // GROUP).to(tl.int64) * ks_h, kept, 0.0)
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(first, last, BM):
        t = start + m
        q_at = q + b * qs_b + t.to(tl.int64)[:, None] * qs_t + d[None, :]
        asks = t < last
        if HIGHEST:
            x = tl.zeros([BM, BN], tl.float32)
            for number in range(heads):
                h = b * 0 + number  # in 64 bits
                qx = tl.load(q_at + h * qs_h, asks[:, None] & has[None, :], 0.0)
                kx = tl.load(k_at + h // GROUP * ks_h, kept, 0.0)
                whole = tl.load(lse + (b * heads + h) * queries + t, asks, 0.0)
                weight = tl.exp2(tl.dot(qx, kx, input_precision=PRECISION) * factor - whole[:, None])
                x = tl.maximum(x, weight, propagate_nan=tl.PropagateNan.ALL)
        else:
            qx = tl.load(q_at + part.to(tl.int64) * qs_h, asks[:, None] & has[None, :], 0.0)
            whole = tl.load(lse + (b * heads + part) * queries + t, asks, 0.0)
            x = tl.exp2(tl.dot(qx, kx, input_precision=PRECISION) * factor - whole[:, None])
        seen = real[None, :] & asks[:, None]
        if CAUSAL:
            seen = seen & (j[None, :] <= (off + t)[:, None])
        sums += tl.where(seen, x, 0.0)
    tl.store(out + (b * tl.num_programs(1) + part) * keys + j, tl.sum(sums, 0), j < keys)


def _sizes(q: Tensor, k: Tensor) -> tuple[dict[str, int], dict[str, object]]:
    """Tiles, and what is the same for both passes."""
    full = q.dtype == torch.float32  # without tensor cores tiles lie in registers
    wide = max(16, triton.next_power_of_2(q.shape[3]))
    most = 32 if full else 64 if wide > 128 else 128
    rows, columns = (min(n, max(16, triton.next_power_of_2(x.shape[2]))) for n, x in ((most, q), (min(most, 64), k)))
    tiles = {"BM": rows, "BN": columns, "BD": wide}
    return tiles, {"PRECISION": "ieee" if full else "tf32", "num_warps": 8 if rows * columns > 4096 else 4, "num_stages": 2}


def _inputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # the interpreter multiplies BF16's bits as whole numbers
        return q.float(), k.float()
    return q, k


def _span(span: Tensor | None, q: Tensor) -> tuple[Tensor, bool]:
    return (q, False) if span is None else (span.contiguous(), True)


def _row_sums(q: Tensor, k: Tensor, scale: float, span: Tensor | None, causal: bool) -> Tensor:
    """[B, H, T]: logarithms of the rows' sums, base 2."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    tiles, rest = _sizes(q, k)
    out = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    bounds, bounded = _span(span, q)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        _rows[(triton.cdiv(queries, tiles["BM"]), heads, batch)](
            q, k, out, bounds, queries, keys, keys - queries, width, scale * LOG2_E, *q.stride()[:3], *k.stride()[:3],
            GROUP=heads // k.shape[1], SPAN=bounded, CAUSAL=causal, **tiles, **rest,
        )  # fmt: skip
    return out


def lse(q: Tensor, k: Tensor, scale: float, span: Tensor | None = None, causal: bool = False) -> Tensor:
    """As the reference."""
    return _row_sums(*_inputs(q, k), scale, span, causal) / LOG2_E


def received(
    q: Tensor, k: Tensor, scale: float, span: Tensor | None = None, asking: Tensor | None = None, causal: bool = False, highest: bool = False
) -> Tensor:  # fmt: skip
    """As the reference."""
    q, k = _inputs(q, k)
    whole = _row_sums(q, k, scale, span, causal)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    tiles, rest = _sizes(q, k)
    parts = 1 if highest else heads
    out = torch.empty(batch, parts, keys, dtype=torch.float32, device=q.device)
    bounds, bounded = _span(span, q)
    asked, is_asked = _span(span if asking is None else asking, q)
    with torch.cuda.device_of(q):
        _columns[(triton.cdiv(keys, tiles["BN"]), parts, batch)](
            q, k, whole, out, bounds, asked, heads, queries, keys, keys - queries, width, scale * LOG2_E, *q.stride()[:3], *k.stride()[:3],
            GROUP=heads // k.shape[1], SPAN=bounded, ASKING=is_asked, CAUSAL=causal, HIGHEST=highest, **tiles, **rest,
        )  # fmt: skip
    return out.mean(1)
