"""Stem's scores: one pass over queries, keys and values, then one product of what they are pooled to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...prefill import Prefill

# tokens that a program of `_pool` adds up at a time
TOKENS = 16
# groups of values a program treats
GROUPS = 8


@triton.jit
def _pool(x, out, tokens, width, factor, xs_h, xs_t, BLOCK: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, REVERSE: tl.constexpr, BD: tl.constexpr):
    p, h = tl.program_id(0), tl.program_id(1)
    t, d = tl.arange(0, TOKENS), tl.arange(0, BD)
    x += h.to(tl.int64) * xs_h
    has = d[None, :] < width
    total = tl.zeros([TOKENS, BD], tl.float32)
    for start in tl.static_range(0, BLOCK, TOKENS):
        token = p * BLOCK + start + t
        total += tl.load(x + token.to(tl.int64)[:, None] * xs_t + d[None, :], (token < tokens)[:, None] & has, 0.0).to(tl.float32)
    total = tl.sum(tl.reshape(total, [TOKENS // STRIDE, STRIDE, BD]), 0) * (factor * STRIDE / tl.minimum(tokens - p * BLOCK, BLOCK).to(tl.float32))
    place = tl.arange(0, STRIDE)
    if REVERSE:
        place = STRIDE - 1 - place
    at = out + ((h.to(tl.int64) * tl.num_programs(0) + p) * STRIDE + place)[:, None] * width + d[None, :]
    tl.store(at, total.to(out.dtype.element_ty), tl.broadcast_to(has, [STRIDE, BD]))


@triton.jit
def _product(
    q, k, bias, out, rows, columns, width, off, q_len, factor, weight,
    GROUP: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(2)
    i, j, w = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    # tiles in every row's future are not computed
    if tl.program_id(0) * BN <= (off + tl.minimum((tl.program_id(1) + 1) * BM * BLOCK, q_len) - 1) // BLOCK:
        q_at = q + (h.to(tl.int64) * rows + i)[:, None] * width + w[None, :]
        k_at = k + ((h // GROUP).to(tl.int64) * columns + j)[:, None] * width + w[None, :]
        s = tl.zeros([BM, BN], tl.float32)
        for start in range(0, width, BK):
            has = (start + w < width)[None, :]
            qx = tl.load(q_at + start, (i < rows)[:, None] & has, 0.0)
            kx = tl.load(k_at + start, (j < columns)[:, None] & has, 0.0)
            s = tl.dot(qx, tl.trans(kx), s, input_precision=PRECISION)
        s *= factor
        if BIAS:
            s += weight * tl.load(bias + (h // GROUP) * columns + j, j < columns, 0.0)[None, :]
        tl.store(out + (h.to(tl.int64) * rows + i)[:, None] * columns + j[None, :], s, (i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def _value_logs(v, out, tokens, width, groups, vs_h, vs_t, STRIDE: tl.constexpr, GROUPS: tl.constexpr, BD: tl.constexpr):
    p, h = tl.program_id(0), tl.program_id(1)
    token, d = p * GROUPS * STRIDE + tl.arange(0, GROUPS * STRIDE), tl.arange(0, BD)
    at = v + h.to(tl.int64) * vs_h + token.to(tl.int64)[:, None] * vs_t + d[None, :]
    x = tl.load(at, (token < tokens)[:, None] & (d < width)[None, :], 0.0).to(tl.float32)
    largest = tl.max(tl.reshape(tl.sqrt(tl.sum(x * x, 1)), [GROUPS, STRIDE]), 1)
    group = p * GROUPS + tl.arange(0, GROUPS)
    tl.store(out + h * groups + group, tl.log(largest + 1e-6), group < groups)


@triton.jit
def _value_bias(logs, bias, groups, columns, PARTS: tl.constexpr, BLOCKS: tl.constexpr):
    h = tl.program_id(0)
    b, e = tl.arange(0, BLOCKS), tl.arange(0, PARTS)
    logs += h * groups
    total = tl.zeros([BLOCKS, PARTS], tl.float32)
    for start in range(0, columns, BLOCKS):
        at = (start + b)[:, None] * PARTS + e[None, :]
        total += tl.load(logs + at, at < groups, 0.0)
    mean = tl.sum(tl.sum(total, 1), 0) / groups
    total = tl.zeros([BLOCKS, PARTS], tl.float32)
    for start in range(0, columns, BLOCKS):
        at = (start + b)[:, None] * PARTS + e[None, :]
        apart = tl.where(at < groups, tl.load(logs + at, at < groups, 0.0) - mean, 0.0)
        total += apart * apart
    std = tl.sqrt(tl.sum(tl.sum(total, 1), 0) / tl.maximum(groups - 1, 1).to(tl.float32)) + 1e-6
    for start in range(0, columns, BLOCKS):
        at = (start + b)[:, None] * PARTS + e[None, :]
        z = tl.where(at < groups, tl.maximum((tl.load(logs + at, at < groups, 0.0) - mean) / std, 0.0), 0.0)
        real = tl.maximum(tl.minimum(groups - (start + b) * PARTS, PARTS), 1).to(tl.float32)
        tl.store(bias + h * columns + start + b, tl.sum(z, 1) / real, start + b < columns)


def pool(x: Tensor, block: int, stride: int, reverse: bool, factor: float) -> Tensor:
    """[H, P, stride * D], in x's dtype: the mean over a block's strides of `factor` times the tokens of a stride side by side."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    heads, tokens, width = x.shape
    blocks = triton.cdiv(tokens, block)
    out = x.new_empty(heads, blocks, stride * width)
    with torch.cuda.device_of(x):
        _pool[(blocks, heads)](
            x, out, tokens, width, factor, *x.stride()[:2],
            BLOCK=block, STRIDE=stride, TOKENS=min(block, max(stride, TOKENS)), REVERSE=reverse, BD=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return out


def product(s: Prefill, q: Tensor, k: Tensor, factor: float, bias: Tensor | None, weight: float) -> Tensor:
    """[Hq, Pq, Pk], fp32: `factor` times products of pooled q [Hq, Pq, W] and k [Hkv, Pk, W], plus `weight` times a bias [Hkv, Pk]; the future is not written."""
    heads, rows, width = q.shape
    columns = k.shape[1]
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # the interpreter multiplies BF16's bits as whole numbers
        q, k = q.float(), k.float()
    out = torch.empty(heads, rows, columns, dtype=torch.float32, device=q.device)
    tile = 128 if rows > 64 else 64
    with torch.cuda.device_of(q):
        _product[(triton.cdiv(columns, tile), triton.cdiv(rows, tile), heads)](
            q, k, out if bias is None else bias, out, rows, columns, width, s.off, s.q_len, float(factor), float(weight),
            GROUP=s.groups, BIAS=bias is not None, BLOCK=s.block, BM=tile, BN=tile, BK=64 if q.dtype != torch.float32 else 32,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=8 if tile == 128 else 4, num_stages=4,
        )  # fmt: skip
    return out


def antidiagonal_mean(s: Prefill, stride: int, bias: Tensor | None, weight: float) -> Tensor:
    """As the reference, but for what comes after a row's last position: that holds anything."""
    q, k = (pool(x, s.block, stride, reverse, 1.0) for x, reverse in ((s.q, True), (s.k, False)))
    return product(s, q, k, s.scale / stride, bias, weight)


def value_bias(s: Prefill, stride: int) -> Tensor:
    """As the reference with z-scores."""
    v = s.v if s.v.stride(-1) == 1 else s.v.contiguous()
    heads, tokens, width = v.shape
    groups, parts = triton.cdiv(tokens, stride), s.block // stride
    logs = torch.empty(heads, groups, dtype=torch.float32, device=v.device)
    bias = torch.empty(heads, s.columns, dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(v):
        _value_logs[(triton.cdiv(groups, GROUPS), heads)](
            v, logs, tokens, width, groups, *v.stride()[:2], STRIDE=stride, GROUPS=GROUPS, BD=triton.next_power_of_2(width), num_warps=4
        )
        _value_bias[(heads,)](logs, bias, groups, s.columns, PARTS=parts, BLOCKS=max(1, 2048 // parts), num_warps=8)
    return bias
