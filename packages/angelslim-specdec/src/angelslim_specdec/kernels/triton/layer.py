"""What stands between the products of a layer: sums in FP32, and rounded where the reference rounds.

Shapes: as the references have them; a program takes a row, a head of a token, or a piece of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..layer import HeadNorms, Rounding

ROUNDINGS = {"once": 0, "twice": 1, "plus_one": 2}
# values of a program of `gated`, and logits that one of `choose` reads at a time
_PIECE, _CHUNK = 1024, 8192
# chunks up to which one program reads a whole row: another launch takes longer
_ALONE = 4


@triton.jit
def _normed(v, inside, weight, eps, width, ROUNDING: tl.constexpr, DTYPE: tl.constexpr):
    y = v * tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    w = tl.load(weight, inside, 0.0).to(tl.float32)
    if ROUNDING == 1:
        y = y.to(DTYPE).to(tl.float32)
    if ROUNDING == 2:
        w += 1.0
    return y * w


@triton.jit
def _norm(x, added, weight, total, out, eps, width, xs, rs, ADD: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = c < width
    v = tl.load(x + row * xs + c, inside, 0.0).to(tl.float32)
    if ADD:
        v = (v + tl.load(added + row * rs + c, inside, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * width + c, v, inside)
        v = v.to(tl.float32)
    y = _normed(v, inside, weight + c, eps, width, ROUNDING, out.dtype.element_ty)
    tl.store(out + row * width + c, y.to(out.dtype.element_ty), inside)


@triton.jit
def _embed_norms(
    tokens, carried, embedding, of_embedding, of_carried, out, scale, eps, count, width, hidden, ts_b, ts_t, es, cs,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # of a row one program takes the embedding, another what is carried
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    out += row * (width + hidden)
    if tl.program_id(1) == 0:
        inside = c < width
        token = tl.load(tokens + row // count * ts_b + row % count * ts_t)
        e = tl.load(embedding + token * es + c, inside, 0.0)
        if SCALED:
            e = (e.to(tl.float32) * scale).to(embedding.dtype.element_ty)
        e = e.to(out.dtype.element_ty).to(tl.float32)
        y = _normed(e, inside, of_embedding + c, eps, width, 0, out.dtype.element_ty)
        tl.store(out + c, y.to(out.dtype.element_ty), inside)
    else:
        inside = c < hidden
        v = tl.load(carried + row * cs + c, inside, 0.0).to(tl.float32)
        y = _normed(v, inside, of_carried + c, eps, hidden, 0, out.dtype.element_ty)
        tl.store(out + width + c, y.to(out.dtype.element_ty), inside)


@triton.jit
def _gated(gate, up, out, width, gs, us, PIECE: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = c < width
    g = tl.load(gate + row * gs + c, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * us + c, inside, 0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + c, (silu * u).to(out.dtype.element_ty), inside)


@triton.jit
def _turn_head(x, out, cos, sin, weight, eps, half, NORM: tl.constexpr, ROUNDING: tl.constexpr, HALF: tl.constexpr):
    # one head: both halves, normed before if asked, each product rounded as torch's are
    c = tl.arange(0, HALF)
    inside = c < half
    dtype = out.dtype.element_ty
    low, high = tl.load(x + c, inside, 0.0).to(tl.float32), tl.load(x + half + c, inside, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / (2 * half) + eps)
        low, high = low * scale, high * scale
        w_low, w_high = tl.load(weight + c, inside, 0.0).to(tl.float32), tl.load(weight + half + c, inside, 0.0).to(tl.float32)
        if ROUNDING == 1:
            low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        if ROUNDING == 2:
            w_low, w_high = w_low + 1.0, w_high + 1.0
        low, high = (low * w_low).to(dtype).to(tl.float32), (high * w_high).to(dtype).to(tl.float32)
    cos_low, cos_high = tl.load(cos + c, inside, 0.0).to(dtype).to(tl.float32), tl.load(cos + half + c, inside, 0.0).to(dtype).to(tl.float32)
    sin_low, sin_high = tl.load(sin + c, inside, 0.0).to(dtype).to(tl.float32), tl.load(sin + half + c, inside, 0.0).to(dtype).to(tl.float32)
    a, b = (low * cos_low).to(dtype).to(tl.float32), (high * sin_low).to(dtype).to(tl.float32)
    tl.store(out + c, (a - b).to(dtype), inside)
    a, b = (high * cos_high).to(dtype).to(tl.float32), (low * sin_high).to(dtype).to(tl.float32)
    tl.store(out + half + c, (a + b).to(dtype), inside)


@triton.jit(do_not_specialize=["offset", "level", "slots", "rows"])
def _turn(
    q, k, v, cos, sin, q_out, k_out, v_out, lengths, q_weight, k_weight, eps, tokens, heads, kv_heads, half, slots, rows, offset, level,
    qs_b, qs_t, qs_h, ks_b, ks_t, ks_h, vs_b, vs_t, vs_h, cs_b, cs_t, qo_b, qo_h, qo_t, ko_b, ko_h, ko_t, vo_b, vo_h, vo_t,
    STORE: tl.constexpr, TABLE: tl.constexpr, LEVEL: tl.constexpr, NORM: tl.constexpr, ROUNDING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    b, t, head = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens, tl.program_id(1)
    to = t.to(tl.int64)
    if STORE:
        length = tl.load(lengths + b)
        to = tl.minimum(length + offset + t, slots - 1)
    at = b * cs_b + t * cs_t
    if TABLE:
        at = tl.minimum(length + (level if LEVEL else offset + t), rows - 1) * cs_t
    if head < heads:
        _turn_head(
            q + b * qs_b + t * qs_t + head * qs_h, q_out + b * qo_b + t * qo_t + head * qo_h, cos + at, sin + at, q_weight, eps, half, NORM, ROUNDING, HALF
        )
    elif head < heads + kv_heads:
        head -= heads
        _turn_head(
            k + b * ks_b + t * ks_t + head * ks_h, k_out + b * ko_b + to * ko_t + head * ko_h, cos + at, sin + at, k_weight, eps, half, NORM, ROUNDING, HALF
        )
    else:
        head -= heads + kv_heads
        c = tl.arange(0, 2 * HALF)
        value = tl.load(v + b * vs_b + t * vs_t + head * vs_h + c, c < 2 * half, 0.0)
        tl.store(v_out + b * vo_b + to * vo_t + head * vo_h + c, value, c < 2 * half)


@triton.jit
def _best(logits, columns, ids, sure, values, numbers, sums, width, ls, COLUMNS: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr):
    # the highest logit of a piece of a row, its number, and the sum of exponentials below it
    piece, row = tl.program_id(0), tl.program_id(1)
    high, number, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    for step in tl.static_range(STEPS):
        start = (piece * STEPS + step) * CHUNK
        c = start + tl.arange(0, CHUNK)
        z = tl.load(logits + row.to(tl.int64) * ls + c, c < width, float("-inf")).to(tl.float32)
        value, found = tl.max(z, 0, return_indices=True)
        most = tl.maximum(high, value)
        safe = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(high - safe) + tl.sum(tl.exp(z - safe), 0)
        number = tl.where(value > high, start + found, number)
        high = most
    if WHOLE:
        tl.store(ids + row, tl.load(columns + number) if COLUMNS else number.to(tl.int64))
        tl.store(sure + row, 1.0 / total)
    else:
        here = row * tl.num_programs(0) + piece
        tl.store(values + here, high)
        tl.store(numbers + here, number)
        tl.store(sums + here, total)


@triton.jit
def _merge(columns, ids, sure, values, numbers, sums, pieces, width, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, PIECES)
    here = row * pieces + c
    value = tl.load(values + here, c < pieces, float("-inf"))
    most = tl.max(value, 0)
    # of equals the first piece's; where nothing is a number, any token
    number = tl.min(tl.where((value == most) & (c < pieces), tl.load(numbers + here, c < pieces, 0), width - 1), 0)
    total = tl.sum(tl.load(sums + here, c < pieces, 0.0) * tl.exp(value - most), 0)
    tl.store(ids + row, tl.load(columns + number) if COLUMNS else number.to(tl.int64))
    tl.store(sure + row, 1.0 / total)


def norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """The sum, x itself where nothing is added, and its norm."""
    rows = _rows(x)
    others = rows if added is None else _rows(added)
    total, out = x if added is None else torch.empty_like(rows), torch.empty_like(rows, dtype=x.dtype)
    block = triton.next_power_of_2(rows.shape[1])
    with torch.cuda.device_of(x):
        _norm[(len(rows),)](
            rows, others, weight, total, out, eps, rows.shape[1], rows.stride(0), others.stride(0),
            ADD=added is not None, ROUNDING=ROUNDINGS[rounding], BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return total.view(x.shape), out.view(x.shape)


def embed_norms(tokens: Tensor, carried: Tensor, embedding: Tensor, scale: float, of_embedding: Tensor, of_carried: Tensor, eps: float) -> Tensor:
    """As the reference."""
    rows, width = _rows(carried), embedding.shape[1]
    out = carried.new_empty(*carried.shape[:-1], width + carried.shape[-1])
    block = triton.next_power_of_2(max(width, rows.shape[1]))
    with torch.cuda.device_of(carried):
        _embed_norms[(len(rows), 2)](
            tokens, rows, embedding, of_embedding, of_carried, out, scale, eps, tokens.shape[1], width, rows.shape[1], *tokens.stride(), embedding.stride(0),
            rows.stride(0), SCALED=scale != 1.0, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """As the reference."""
    gates, ups = _rows(gate), _rows(up)
    out = gate.new_empty(gate.shape)
    with torch.cuda.device_of(gate):
        _gated[(len(gates), triton.cdiv(gates.shape[1], _PIECE))](gates, ups, out, gates.shape[1], gates.stride(0), ups.stride(0), PIECE=_PIECE)
    return out


def turn(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, store: tuple[Tensor, Tensor, Tensor] | None = None, offset: int = 0, level: int | None = None,
    norms: HeadNorms | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries [B, h, T, D] and keys [B, g, T, D] turned; with keys, values and lengths to `store` in, these keys are the stored ones."""
    (batch, tokens, heads, width), kv_heads = q.shape, k.shape[2]
    q_out = q.new_empty(batch, tokens, heads, width).transpose(1, 2)
    if store is None:
        k_out = k.new_empty(batch, tokens, kv_heads, width).transpose(1, 2)
        v_out, lengths = k_out, k_out
    else:
        k_out, v_out, lengths = store
    table = cos.dim() == 2
    turns = (0, cos.stride(0)) if table else (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
        turns = (0, width) if table else (cos.stride(0) if len(cos) > 1 else 0, width)
    q_weight, k_weight, eps, rounding = (q, k, 0.0, "once") if norms is None else norms
    with torch.cuda.device_of(q):
        # each product is rounded as torch's is: none is fused with a sum
        _turn[(batch * tokens, heads + (1 if store is None else 2) * kv_heads)](
            q, k, v, cos, sin, q_out, k_out, v_out, lengths, q_weight, k_weight, eps, tokens, heads, kv_heads, width // 2, k_out.shape[2],
            cos.shape[0], offset, level or 0, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *turns, *q_out.stride()[:3], *k_out.stride()[:3],
            *v_out.stride()[:3], STORE=store is not None, TABLE=table, LEVEL=level is not None, NORM=norms is not None, ROUNDING=ROUNDINGS[rounding],
            HALF=triton.next_power_of_2(width // 2), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return q_out, k_out


def choose(logits: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the reference."""
    rows, width = logits.shape
    steps = triton.cdiv(width, _CHUNK)
    pieces, steps = (1, steps) if steps <= _ALONE else (steps, 1)
    ids, sure = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
    of = ids if columns is None else columns
    values, numbers, sums = (logits.new_empty(rows, pieces, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.float32))
    with torch.cuda.device_of(logits):
        _best[(pieces, rows)](
            logits, of, ids, sure, values, numbers, sums, width, logits.stride(0),
            COLUMNS=columns is not None, STEPS=steps, WHOLE=pieces == 1, CHUNK=min(_CHUNK, triton.next_power_of_2(width)), num_warps=16,
        )  # fmt: skip
        if pieces > 1:
            _merge[(rows,)](
                of, ids, sure, values, numbers, sums, pieces, width, COLUMNS=columns is not None, PIECES=triton.next_power_of_2(pieces), num_warps=1
            )
    return ids, sure


def _rows(x: Tensor) -> Tensor:
    """[N, H] of [..., H], without a copy where one stride leads from row to row."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))
