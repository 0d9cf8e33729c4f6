"""Attention of few tokens to many slots in one launch: programs share a row's keys, and the last to finish merges what the others left.

Shapes: B rows, T tokens, A slots of new tokens, G query heads of a KV head; rows of a program are G heads of some tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ...attention import Visible


class Config(NamedTuple):
    """How the kernel runs; none of it changes what it computes beyond rounding.

    Args:
        keys: the fewest that a program takes of a row whose keys are shared.
        alone: keys up to which a row's are not shared: one program then needs no one to wait for.
        programs: wanted on each multiprocessor.
        tile_bytes: of keys and values that a program reads at a time; half of it in FP32.
        warps, stages: of a program, but for FP32; stages are tiles on their way.
    """

    keys: int = 256
    alone: int = 512
    programs: int = 1
    tile_bytes: int = 32768
    warps: int = 4
    stages: int = 3


@triton.jit
def _fold(m, total, acc, m_new, weight, y):
    # two parts of a softmax by the highest score of each, in base 2; -inf where a part saw nothing
    most = tl.maximum(m, m_new)
    safe = tl.where(most == float("-inf"), 0.0, most)
    a, b = tl.exp2(m - safe), tl.exp2(m_new - safe)
    return most, total * a + weight * b, acc * a[:, None] + y * b[:, None]


@triton.jit(do_not_specialize=["slots", "window"])
def _kernel(
    q, k, v, out, part, lse, done, lengths, depths, ancestors, scale_log2, tokens, new_slots, slots, window, width, v_width,
    qs_b, qs_h, qs_t, ks_b, ks_h, ks_n, vs_b, vs_h, vs_n, ds_b, as_b, as_t, as_a,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr, ALONE: tl.constexpr, TREE: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    split, b = tl.program_id(0), tl.program_id(2)
    tiles = tl.cdiv(tokens * GROUP, BM)
    kv, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    length = tl.load(lengths + b).to(tl.int32)
    end = tl.minimum(length + new_slots, slots)
    low = tl.maximum(length - window + 1, 0) if WINDOW else 0  # no token lies before the confirmed ones
    keys = end - low
    share = tl.maximum(tl.cdiv(tl.cdiv(keys, BN), SPLITS) * BN, KEYS)
    share = tl.where(keys <= ALONE, ALONE, share)
    live = tl.cdiv(keys, share)
    if split < live:
        first = low + split * share
        last = tl.minimum(first + share, end)
        row = tile * BM + tl.arange(0, BM)
        real = row < tokens * GROUP
        t = tl.where(real, row // GROUP, 0)
        head = kv * GROUP + row % GROUP
        d, e = tl.arange(0, BD), tl.arange(0, BV)
        q_at = q + b.to(tl.int64) * qs_b + head[:, None] * qs_h + t[:, None] * qs_t + d[None, :]
        qx = tl.load(q_at, real[:, None] & (d < width)[None, :], 0.0)
        k += b.to(tl.int64) * ks_b + kv.to(tl.int64) * ks_h
        v += b.to(tl.int64) * vs_b + kv.to(tl.int64) * vs_h
        if TREE:  # what a token sees of the new ones, a bit for each
            a = tl.arange(0, BA)
            bits = tl.load(ancestors + b.to(tl.int64) * as_b + t[:, None] * as_t + a[None, :] * as_a, (a < new_slots)[None, :], 0).to(tl.int64)
            bits = tl.sum(bits << a[None, :].to(tl.int64), 1)
        if WINDOW:
            depth = tl.load(depths + b.to(tl.int64) * ds_b + t)

        m = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BV], tl.float32)
        for start in range(first, last, BN):
            n = start + tl.arange(0, BN)
            inside = n < last
            new = n - length
            kx = tl.load(k + n[None, :] * ks_n + d[:, None], inside[None, :] & (d < width)[:, None], 0.0)
            vx = tl.load(v + n[:, None] * vs_n + e[None, :], inside[:, None] & (e < v_width)[None, :], 0.0)
            if TREE:
                among = (bits[:, None] >> tl.maximum(new, 0).to(tl.int64)[None, :]) & 1
                seen = inside[None, :] & ((new < 0)[None, :] | (among != 0))
            else:
                seen = inside[None, :] & (new[None, :] <= t[:, None])
            if WINDOW:
                key_depth = tl.load(depths + b.to(tl.int64) * ds_b + new, inside & (new >= 0), 0)
                seen = seen & (depth[:, None] - tl.where(new < 0, new, key_depth)[None, :] < window)
            s = tl.where(seen, tl.dot(qx, kx, input_precision=PRECISION) * scale_log2, float("-inf"))
            most = tl.maximum(m, tl.max(s, 1))
            safe = tl.where(most == float("-inf"), 0.0, most)
            p = tl.exp2(s - safe[:, None])
            a_old = tl.exp2(m - safe)
            total = total * a_old + tl.sum(p, 1)
            acc = tl.dot(p.to(vx.dtype), vx, acc * a_old[:, None], input_precision=PRECISION)
            m = most

        here = tl.program_id(1) + b.to(tl.int64) * tl.num_programs(1)
        whole = live == 1
        if SPLITS > 1:  # noqa: SIM102 (known when it is compiled)
            if live > 1:
                at = (here * SPLITS + split) * BM + tl.arange(0, BM)
                tl.store(part + at[:, None] * BV + e[None, :], acc)
                tl.store(lse + at * 2, m)
                tl.store(lse + at * 2 + 1, total)
                tl.debug_barrier()  # all threads have stored before one of them says so
                whole = tl.atomic_add(done + here, 1, sem="acq_rel") == live - 1
                if whole:
                    m = tl.full([BM], float("-inf"), tl.float32)
                    total = tl.zeros([BM], tl.float32)
                    acc = tl.zeros([BM, BV], tl.float32)
                    for other in range(live):  # in order, whoever came last
                        at = (here * SPLITS + other) * BM + tl.arange(0, BM)
                        y = tl.load(part + at[:, None] * BV + e[None, :], cache_modifier=".cg")
                        m, total, acc = _fold(m, total, acc, tl.load(lse + at * 2, cache_modifier=".cg"), tl.load(lse + at * 2 + 1, cache_modifier=".cg"), y)
                    tl.store(done + here, 0)  # for the next launch
        if whole:
            heads = tl.num_programs(1) // tiles * GROUP
            out_at = out + ((b.to(tl.int64) * tokens + t) * heads + head)[:, None] * v_width + e[None, :]
            tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), real[:, None] & (e < v_width)[None, :])


def verify_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, window: int | None = None, config: Config | None = None) -> Tensor:
    """As the reference."""
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # the interpreter multiplies BF16's bits as whole numbers
        return verify_attention(q.float(), k.float(), v.float(), visible, scale, window, config).bfloat16()
    assert visible.lengths is not None
    config = config or Config()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, width = q.shape
    kv_heads, slots, v_width = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    wide_d, wide_v = (max(16, triton.next_power_of_2(n)) for n in (width, v_width))
    full = q.dtype == torch.float32  # without tensor cores tiles lie in registers
    rows = min(64 if not full else 16 if wide_d > 128 else 32, max(16, triton.next_power_of_2(group * tokens)))
    heads_and_tiles = kv_heads * triton.cdiv(group * tokens, rows)
    tile_bytes = config.tile_bytes // 2 if full else config.tile_bytes
    tile = min(128, max(16, triton.next_power_of_2(tile_bytes // ((wide_d + wide_v) * q.element_size()) + 1) // 2))
    places = config.programs * _multiprocessors(q) // (batch * heads_and_tiles)
    splits = 1 if slots <= config.alone else max(1, min(places, triton.cdiv(slots, config.keys)))
    out = q.new_empty(batch, tokens, heads, v_width)
    # one layer after the other uses the same memory; the counters are 0 again after each
    part, lse, done = visible.room((splits, batch * heads_and_tiles, rows, wide_v), lambda: _room(q, splits, batch * heads_and_tiles, rows, wide_v))
    tree, depths = visible.ancestors, visible.depths
    bits = q if tree is None else tree.view(torch.uint8)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        _kernel[(splits, heads_and_tiles, batch)](
            q, k, v, out, part, lse, done, visible.lengths, depths, bits, scale / math.log(2), tokens,
            tokens if tree is None else tree.shape[2], slots, window or 0, width, v_width,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], depths.stride(0) if depths.dim() == 2 else 0, *((0, 0, 0) if tree is None else tree.stride()),
            GROUP=group, SPLITS=splits, KEYS=config.keys, ALONE=config.alone, TREE=tree is not None, WINDOW=window is not None,
            PRECISION="ieee" if full else "tf32",
            BM=rows, BN=tile, BA=1 if tree is None else triton.next_power_of_2(tree.shape[2]), BD=wide_d, BV=wide_v,
            num_warps=8 if full else config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out.transpose(1, 2)


def _room(q: Tensor, splits: int, programs: int, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where programs leave their parts: values, their highest scores and sums, and how many are done."""
    if splits == 1:
        return q, q, q
    sizes = (programs, splits, rows)
    part, lse = q.new_empty((*sizes, width), dtype=torch.float32), q.new_empty((*sizes, 2), dtype=torch.float32)
    return part, lse, torch.zeros(programs, dtype=torch.int32, device=q.device)


def _multiprocessors(q: Tensor) -> int:
    """Of the interpreter's machine as many as make it share a row's keys."""
    return torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 132
