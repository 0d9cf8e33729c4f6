"""Block-sparse attention: a program for each block of queries of each head, online softmax in base 2."""

import math
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...block_index import BlockIndex

HOPPER_SHARED_BYTES = 227 * 1024
LOG2 = math.log(2)


class Config(NamedTuple):
    """How the kernel runs; none of it changes what it computes beyond rounding.

    Args:
        tile: keys at a time, at most a block; fewer where shared memory is short.
        warps, stages: of a program; stages are tiles on their way.
        registers: the most a thread may have, so that two programs fit on a multiprocessor; None: as many as it takes.
        tma: whether keys and values come by the tensor memory accelerator, where it is there and their layout allows it.
        together: KV heads whose programs run side by side; 0: all. One after the other, a head's keys stay in the L2 cache.
        widest: heads that it is for.
        hopper: whether it is the kernel of `hopper`; warps, registers and tma are not its.
        by_turns: of `hopper` only.
    """

    tile: int = 128
    warps: int = 8
    stages: int = 2
    registers: int | None = None
    tma: bool = True
    together: int = 1
    widest: int = 256
    hopper: bool = False
    by_turns: bool = False


CONFIGS = {
    "128": Config(),
    "128-pointers": Config(tma=False),
    "128-all": Config(together=0),
    "64": Config(64, stages=3),
    "64-pointers": Config(64, stages=3, tma=False),
    "64-4-stages": Config(64, stages=4),
    "64-twice": Config(64, stages=2, registers=128, widest=128),
    "64-narrow": Config(64, warps=4, stages=2),
    "64-narrow-3-stages": Config(64, warps=4, stages=3),
    "64-narrow-all": Config(64, warps=4, stages=2, together=0),
    "32-narrow": Config(32, warps=4, stages=3),
    "hopper": Config(hopper=True),
    "hopper-turns": Config(hopper=True, by_turns=True),
    "hopper-all": Config(hopper=True, together=0),
}
# names of CONFIGS, fastest first; the last takes every call
FASTEST = ("hopper", "64-twice", "128")


@triton.jit
def _rows(x, b, h, first, n, x_t, e, mask, TMA: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr, W: tl.constexpr):
    # keys or values n [T], which are first, first + 1 ... where they come by TMA: [T, W]
    if TMA:
        tile = x.load([b, h, first, 0]).reshape(T, W)
    else:
        at = x + n.to(tl.int64)[:, None] * x_t + e[None, :]
        tile = tl.load(at) if FULL else tl.load(at, mask, 0.0)
    return tile


@triton.jit
def _fold(s, v, m, total, acc, scale_log2, PRECISION: tl.constexpr):
    m2 = tl.maximum(m, tl.max(s, 1) * scale_log2)
    a = tl.exp2(m - m2)
    p = tl.exp2(s * scale_log2 - m2[:, None])
    total = total * a + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * a[:, None], input_precision=PRECISION)
    return m2, total, acc


@triton.jit(do_not_specialize=["q_lens", "kv_lens", "limits", "heads", "queries", "rows"])
def _kernel(
    q, k, v, out, lse, row_ptr, col, token_ptr, token, q_lens, kv_lens, limits, scale_log2, heads, queries, rows, width, v_width,
    qs_b, qs_h, qs_t, ks_b, ks_h, ks_t, vs_b, vs_h, vs_t,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, LISTS_SHARE: tl.constexpr, OWN_FIRST: tl.constexpr,
    SAME: tl.constexpr, CLEAN: tl.constexpr, SKIP: tl.constexpr, TOKENS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, FULL_D: tl.constexpr, FULL_V: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BN // TN
    # the query heads of a KV head side by side, late queries, which have the longest lists, first
    program = tl.program_id(0)
    beside = program % (GROUP * TOGETHER)
    i = rows - 1 - program // (GROUP * TOGETHER) % rows
    bh = program // (GROUP * TOGETHER * rows) * (GROUP * TOGETHER) + beside
    b, h = bh // heads, bh % heads
    kv = h // GROUP
    row = (bh // LISTS_SHARE).to(tl.int64) * rows + i
    if SAME:
        q_len, kv_len, limit = q_lens, kv_lens, limits
    else:
        q_len, kv_len, limit = tl.load(q_lens + b), tl.load(kv_lens + b), tl.load(limits + b)
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
        if not TMA:
            k += b.to(tl.int64) * ks_b + kv.to(tl.int64) * ks_h
            v += b.to(tl.int64) * vs_b + kv.to(tl.int64) * vs_h
        q_at = q + b.to(tl.int64) * qs_b + h.to(tl.int64) * qs_h + x.to(tl.int64)[:, None] * qs_t + d[None, :]
        qx = tl.load(q_at, real[:, None] & (d[None, :] < width), 0.0)
        has_d = d[None, :] < width
        has_e = e[None, :] < v_width
        m = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BV], tl.float32)

        # own blocks first: after the first tile every row has a finite maximum, as it starts no later than any query
        first = (off + i * BM) // BN
        end = off + tl.minimum((i + 1) * BM, q_len)
        for tile in range(first * PARTS, tl.cdiv(end, TN)):
            n = tile * TN + t
            lives = (n < kv_len)[:, None]
            kx = _rows(k, b, kv, tile * TN, n, ks_t, d, lives & has_d, TMA, False, TN, BD)
            s = tl.dot(qx, tl.trans(kx), input_precision=PRECISION)
            s = tl.where((n[None, :] <= (off + x)[:, None]) & (n[None, :] < kv_len), s, float("-inf"))
            vx = _rows(v, b, kv, tile * TN, n, vs_t, e, lives & has_e, TMA, False, TN, BV)
            if CLEAN:  # what lies behind a shorter sequence may be NaN
                vx = tl.where(lives, vx, 0.0)
            m, total, acc = _fold(s, vx, m, total, acc, scale_log2, PRECISION)

        own = (end - 1) // BN - first + 1
        start = tl.load(row_ptr + row).to(tl.int64)
        count = (tl.load(row_ptr + row + 1) - start).to(tl.int32) - own
        listed = col + start
        if OWN_FIRST:
            listed += own
        if SKIP and PARTS > 1:  # all of a block decides whether it is skipped: its tiles are looked at to decide, and again to fold
            for at in range(count):
                n0 = tl.load(listed + at).to(tl.int32) * BN
                highest = tl.full([BM], float("-inf"), tl.float32)
                for part in range(PARTS):
                    kx = _rows(k, b, kv, n0 + part * TN, n0 + part * TN + t, ks_t, d, has_d, TMA, FULL_D, TN, BD)
                    highest = tl.maximum(highest, tl.max(tl.dot(qx, tl.trans(kx), input_precision=PRECISION), 1))
                if tl.max(tl.where(real, highest * scale_log2 - m, float("-inf")), 0) >= limit:
                    for part in range(PARTS):
                        kx = _rows(k, b, kv, n0 + part * TN, n0 + part * TN + t, ks_t, d, has_d, TMA, FULL_D, TN, BD)
                        s = tl.dot(qx, tl.trans(kx), input_precision=PRECISION)
                        vx = _rows(v, b, kv, n0 + part * TN, n0 + part * TN + t, vs_t, e, has_e, TMA, FULL_V, TN, BV)
                        m, total, acc = _fold(s, vx, m, total, acc, scale_log2, PRECISION)
        else:
            for at in range(count * PARTS):
                n0 = tl.load(listed + at // PARTS).to(tl.int32) * BN + at % PARTS * TN
                kx = _rows(k, b, kv, n0, n0 + t, ks_t, d, has_d, TMA, FULL_D, TN, BD)
                s = tl.dot(qx, tl.trans(kx), input_precision=PRECISION)
                if SKIP:
                    gain = tl.max(s, 1) * scale_log2 - m
                    if tl.max(tl.where(real, gain, float("-inf")), 0) >= limit:
                        vx = _rows(v, b, kv, n0, n0 + t, vs_t, e, has_e, TMA, FULL_V, TN, BV)
                        m, total, acc = _fold(s, vx, m, total, acc, scale_log2, PRECISION)
                else:
                    vx = _rows(v, b, kv, n0, n0 + t, vs_t, e, has_e, TMA, FULL_V, TN, BV)
                    m, total, acc = _fold(s, vx, m, total, acc, scale_log2, PRECISION)

        if TOKENS:
            start, stop = tl.load(token_ptr + row), tl.load(token_ptr + row + 1)
            for at in range(start, stop, TN):
                lives = at + t < stop
                n = tl.load(token + at + t, lives, 0)
                kx = _rows(k, b, kv, 0, n, ks_t, d, lives[:, None] & has_d, False, False, TN, BD)
                s = tl.dot(qx, tl.trans(kx), input_precision=PRECISION)
                s = tl.where(lives[None, :], s, float("-inf"))
                vx = _rows(v, b, kv, 0, n, vs_t, e, lives[:, None] & has_e, False, False, TN, BV)
                m, total, acc = _fold(s, vx, m, total, acc, scale_log2, PRECISION)

        y = tl.where(real[:, None], acc / total[:, None], 0.0)
        tl.store(out_at, y.to(out.dtype.element_ty), out_mask)
        tl.store(lse_at, tl.where(real, (m + tl.log2(total)) * 0.6931471805599453, float("-inf")), x < queries)


def block_sparse(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """As the reference; without `config`, as measured to be fastest."""
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # the interpreter multiplies BF16's bits as whole numbers
        wide, lse = block_sparse(q.float(), k.float(), v.float(), index, scale, config)
        return wide.bfloat16(), lse
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    config = config or _fastest(q, k, v, index)
    batch, heads, queries, width = q.shape
    kv_heads, v_width, rows = k.shape[1], v.shape[-1], index.shape[2]
    together = config.together if config.together and kv_heads % config.together == 0 else batch * kv_heads if config.together == 0 else 1
    if config.hopper:
        from . import hopper

        return hopper.block_sparse(q, k, v, index, scale, config.stages, config.by_turns, together)
    out, lse = q.new_empty(batch, heads, queries, v_width), q.new_empty(batch, heads, queries, dtype=torch.float32)
    wide_d, wide_v = (max(16, triton.next_power_of_2(n)) for n in (width, v_width))
    tile = _tile(q, index, wide_d + wide_v, wide_d, config)
    tma = config.tma and index.tokens is None and _has_tma(q) and all(box_fits(x) for x in (k, v))
    skip = index.skip_below()
    limits = [t / LOG2 for t in skip or [-math.inf] * batch]
    same = len(set(zip(index.q_len, index.kv_len, limits, strict=True))) == 1
    sizes = [n[0] if same else _sent(n, q.device) for n in (index.q_len, index.kv_len, limits)]
    tokens = (index.row_ptr, index.col) if index.tokens is None else index.tokens
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        _kernel[(batch * heads * rows,)](
            q, *(TensorDescriptor.from_tensor(x, [1, 1, tile, w]) if tma else x for x, w in ((k, wide_d), (v, wide_v))),
            out, lse, index.row_ptr, index.col, *tokens, *sizes, scale / LOG2, heads, queries, rows, width, v_width,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            GROUP=heads // kv_heads, TOGETHER=together, LISTS_SHARE=heads // index.shape[1], OWN_FIRST=index.order == "priority",
            SAME=same, CLEAN=tma and min(index.kv_len) < k.shape[2], SKIP=skip is not None, TOKENS=index.tokens is not None, TMA=tma,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            BM=index.block_m, BN=index.block_n, TN=tile, BD=wide_d, BV=wide_v, FULL_D=wide_d == width, FULL_V=wide_v == v_width,
            num_warps=config.warps if index.block_m == 128 else 4, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return out, lse


def _fastest(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> Config:
    """The first of FASTEST that takes the call."""
    for config in (CONFIGS[name] for name in FASTEST):
        if config.hopper:
            if not _has_gluon():
                continue
            from . import hopper

            if not hopper.takes(q, k, v, index):
                continue
        if config.tile < index.block_n and index.skip_below() is not None:  # the keys of each kept block would be read twice
            continue
        if max(q.shape[-1], v.shape[-1]) <= config.widest:
            return config
    raise AssertionError("the last of FASTEST takes every call")


def _sent(values: list[float] | tuple[int, ...], device: torch.device) -> Tensor:
    """One number a sequence, on the device; nothing waits for it to arrive."""
    return torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else torch.int32, pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )


def _tile(q: Tensor, index: BlockIndex, width: int, wide_d: int, config: Config) -> int:
    """Keys at a time: the queries and all stages of keys and values lie in shared memory."""
    memory = _shared_bytes(q.device.index) if q.is_cuda else HOPPER_SHARED_BYTES
    keys = (memory - 4096 - index.block_m * wide_d * q.element_size()) // (config.stages * width * q.element_size())
    wanted = 32 if q.is_cuda and q.dtype == torch.float32 else config.tile  # fp32 has no tensor cores: a wide tile is more than the registers hold
    return min(index.block_n, wanted, max(16, triton.next_power_of_2(keys + 1) // 2))


@cache
def _has_gluon() -> bool:
    return find_spec("triton.experimental") is not None and find_spec("triton.experimental.gluon") is not None


@cache  # asking takes a millisecond
def _shared_bytes(device: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _has_tma(q: Tensor) -> bool:
    return not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] >= 9


def box_fits(x: Tensor) -> bool:
    """Whether TMA takes this layout: everything a multiple of 16 bytes."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
