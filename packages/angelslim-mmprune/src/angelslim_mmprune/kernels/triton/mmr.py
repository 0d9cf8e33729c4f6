"""Maximal marginal relevance on a GPU: all cosines by tensor cores, then every pick of a sample in one program that keeps its scores in registers.

FP32 features are split into two BF16 numbers each, whose three products add up to FP32's but for 2**-16 of it; BF16 and FP16 are multiplied as they are.
Sums are made alike on both sides of the diagonal, and cosines that differ from 1 by their rounding only are 1, so that copies of tokens tie.
Without memory for all cosines a launch makes a pick.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...plan import of_host
from ..mmr import GRAM_BYTES, Picks, stacked

# tile of cosines, and numbers of a token that are multiplied at a time
TILE, WIDTH = 128, 64
# tokens of which a program's registers hold the scores
MOST = 16384
# tokens and numbers of them that a program of `_step` has at a time, and programs' best picks of which it makes one
ROWS, COLUMNS = 16, 256


@triton.jit
def _key(score, n, free):
    """int64s whose highest is that of the highest score, of equal ones the lowest number's; below all of them what is not free."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(free, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - n).to(tl.int64), -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _number(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _one(cosine):
    return tl.where(tl.abs(cosine - 1) < 2e-6, 1.0, cosine)


@triton.jit
def _prepare(x, high, low, inverse, counts, tokens, width, padded, xs_b, xs_n, SPLIT: tl.constexpr, BD: tl.constexpr):
    """One over the norm of a token, NaN if it is not finite, and its numbers in two halves."""
    i, b = tl.program_id(0), tl.program_id(1)
    end = tl.where(i < tl.load(counts + b), width, 0)
    d = tl.arange(0, BD)
    x += b.to(tl.int64) * xs_b + i.to(tl.int64) * xs_n
    at = (b * tokens + i).to(tl.int64) * padded
    total = tl.zeros([BD], tl.float32)
    for start in range(0, padded, BD):
        value = tl.load(x + start + d, start + d < end, 0.0).to(tl.float32)
        total += value * value
        if SPLIT:
            top = value.to(high.dtype.element_ty)
            tl.store(high + at + start + d, top, start + d < padded)
            tl.store(low + at + start + d, (value - top.to(tl.float32)).to(low.dtype.element_ty), start + d < padded)
    square = tl.sum(total, 0)
    tl.store(inverse + b * tokens + i, tl.where(square < float("inf"), 1 / (tl.sqrt(square) + 1e-8), float("nan")))


@triton.jit
def _cosines(high, low, inverse, gram, counts, tokens, stride, width, SPLIT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """A tile on or below the diagonal, written to its mirror image as well."""
    p, b = tl.program_id(0), tl.program_id(1)
    i = ((tl.sqrt(8.0 * p.to(tl.float32) + 1) - 1) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    j = p - i * (i + 1) // 2
    if i * TILE < tl.load(counts + b):
        product = tl.zeros([TILE, TILE], tl.float32)
        # sums of their own, so that changing rows for columns changes nothing
        above = tl.zeros([TILE, TILE], tl.float32)
        below = tl.zeros([TILE, TILE], tl.float32)
        for start in range(0, width, WIDTH):
            a = high.load([b, i * TILE, start]).reshape([TILE, WIDTH])
            c = high.load([b, j * TILE, start]).reshape([TILE, WIDTH])
            product = tl.dot(a, tl.trans(c), product)
            if SPLIT:
                above = tl.dot(a, tl.trans(low.load([b, j * TILE, start]).reshape([TILE, WIDTH])), above)
                below = tl.dot(low.load([b, i * TILE, start]).reshape([TILE, WIDTH]), tl.trans(c), below)
        m, n = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        scale = tl.load(inverse + b * tokens + m, m < tokens, 0.0)[:, None] * tl.load(inverse + b * tokens + n, n < tokens, 0.0)[None, :]
        cosine = _one((product + (above + below)) * scale)
        gram += b.to(tl.int64) * tokens * stride
        inside = (m < tokens)[:, None] & (n < tokens)[None, :]
        tl.store(gram + m.to(tl.int64)[:, None] * stride + n[None, :], cosine, inside)
        if i != j:
            tl.store(gram + n.to(tl.int64)[:, None] * stride + m[None, :], tl.trans(cosine), tl.trans(inside))


@triton.jit
def _picks(
    gram, importance, counts, ks, order, tokens, stride, most, lam, rest, parallel_k, RULE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All picks of a sample; a pick is a maximum over the program and the load of a row.

    What a rule keeps of a token is its `state`: of "relevance" the cosine to its nearest pick; of "damped", whose strength is lam, its score.
    """
    b = tl.program_id(0)
    n = tl.arange(0, BN)
    gram += b.to(tl.int64) * tokens * stride
    free = n < tl.load(counts + b)
    weight = tl.load(importance + b * tokens + n, free, 0.0)
    score = weight
    state = weight
    if RULE == "relevance":
        state = tl.full([BN], -1.0, tl.float32)
    for t in range(tl.load(ks + b)):
        if RULE == "damped":
            score = tl.where(state > 0, state, weight - 1)
        elif parallel_k == 1:
            score = tl.where(t > 0, lam * weight - rest * state, weight)
        else:
            score = tl.where((t > 0) & (t % parallel_k == 0), lam * weight - rest * state, score)
        key = tl.max(_key(score, n, free), 0)
        best = _number(key)
        # up to the stride, a multiple of 16, and not to the count, for whole words of 16 bytes; what is read behind is not free
        row = tl.load(gram + best.to(tl.int64) * stride + n, n < stride, 0.0)
        tl.store(order + b * most + t, best.to(tl.int64))
        free = free & (n != best)
        if RULE == "damped":
            far = tl.maximum(1 - row, 0.0)
            # a key of what has a score begins with its bits, and what has none takes nothing
            own = tl.maximum((key >> 32).to(tl.int32), 0).to(tl.float32, bitcast=True)
            state = tl.maximum(state - tl.exp(-lam * far * far) * own, 0.0)
        else:
            state = tl.maximum(state, row)


@triton.jit
def _step(
    x, inverse, importance, score, nearest, keys, next_keys, counts, ks, order, t, tokens, width, most, parts, xs_b, xs_n, lam, rest, parallel_k,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Pick t is the best that the last step's programs found; then each one's own best for pick t + 1. Step -1 picks none.

    What is picked has a nearest of 3, more than any cosine.
    """
    p, b = tl.program_id(0), tl.program_id(1)
    k = tl.load(ks + b)
    if t < k:
        n = p * ROWS + tl.arange(0, ROWS)
        here = n < tl.load(counts + b)
        at = b * tokens + n
        if t < 0:
            own = tl.load(importance + at, here, 0.0)
            tl.store(score + at, own, here)
            tl.store(nearest + at, tl.full([ROWS], -1.0, tl.float32), here)
            tl.store(next_keys + b * parts + p, tl.max(_key(own, n, here), 0))
        else:
            part = tl.arange(0, PARTS)
            highest = tl.full([PARTS], -0x7FFFFFFFFFFFFFFF, tl.int64)
            for start in range(0, parts, PARTS):
                highest = tl.maximum(highest, tl.load(keys + b * parts + start + part, start + part < parts, -0x7FFFFFFFFFFFFFFF))
            best = _number(tl.max(highest, 0))
            if p == 0:
                tl.store(order + b * most + t, best.to(tl.int64))
            if t + 1 < k:
                x += b.to(tl.int64) * xs_b
                d = tl.arange(0, BD)
                total = tl.zeros([ROWS, BD], tl.float32)
                for start in range(0, width, BD):
                    has = start + d < width
                    picked = tl.load(x + best.to(tl.int64) * xs_n + start + d, has, 0.0).to(tl.float32)
                    total += (
                        tl.load(x + n.to(tl.int64)[:, None] * xs_n + start + d[None, :], here[:, None] & has[None, :], 0.0).to(tl.float32) * picked[None, :]
                    )
                cosine = _one(tl.sum(total, 1) * (tl.load(inverse + at, here, 0.0) * tl.load(inverse + b * tokens + best)))
                closest = tl.where(n == best, 3.0, tl.maximum(tl.load(nearest + at, here, 0.0), cosine))
                own = tl.load(score + at, here, 0.0)
                if (t + 1) % parallel_k == 0:
                    own = lam * tl.load(importance + at, here, 0.0) - rest * closest
                tl.store(score + at, own, here)
                tl.store(nearest + at, closest, here)
                tl.store(next_keys + b * parts + p, tl.max(_key(own, n, here & (closest < 2)), 0))


def picks(features: Tensor, importance: Tensor, counts: Sequence[int], ks: Sequence[int], lam: float, parallel_k: int, gram_bytes: int = GRAM_BYTES) -> Picks:
    """As the reference.

    Args:
        gram_bytes: what all cosines of a sample may take; samples that do not fit together take turns.
    """
    features = features if features.stride(-1) == 1 else features.contiguous()
    importance = importance.contiguous()
    sample = 4 * features.shape[1] * _stride(features.shape[1])
    run = _by_cosines if sample <= gram_bytes and features.shape[1] <= MOST else _by_steps
    together = max(1, gram_bytes // sample) if run is _by_cosines else len(counts)
    with torch.cuda.device_of(features):
        parts = [
            run(features[b : b + together], importance[b : b + together], tuple(counts[b : b + together]), tuple(ks[b : b + together]), lam, parallel_k)
            for b in range(0, len(counts), together)
        ]
    return Picks(stacked([part.order for part in parts], max(ks)), torch.stack([part.finite for part in parts]).all())


def _stride(tokens: int) -> int:
    """From a row of cosines to the next, so that rows begin at a multiple of 64 bytes."""
    return -(-tokens // 16) * 16


def _finite(inverse: Tensor, importance: Tensor) -> Tensor:
    # a token behind its sample's count has norm 0 and importance 0
    return (inverse.isfinite() & importance.isfinite()).all()


def cosines(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, stride], fp32: of all tokens with each other, anything behind a sample's count; and [B, N], one over the norms."""
    batch, tokens, width = features.shape
    high, low, inverse = _halves(features, counts)
    tile, part = (TILE, WIDTH) if features.is_cuda else (16, 16)  # small ones are quicker to interpret
    stride, tiles = _stride(tokens), -(-tokens // tile)
    gram = torch.empty(batch, tokens, stride, dtype=torch.float32, device=features.device)
    boxes = [TensorDescriptor(x, x.shape, x.stride(), [1, tile, part]) for x in (high, low)]
    split = low is not high
    # 64 KiB a stage where features are split, else 32
    stages = 3 if not split else max(1, min(3, _shared_bytes(features.device) // (4 * TILE * WIDTH * 2)))
    _cosines[(tiles * (tiles + 1) // 2, batch)](
        *boxes, inverse, gram, counts, tokens, stride, width, SPLIT=split, TILE=tile, WIDTH=part, num_warps=8, num_stages=stages
    )
    return gram, inverse


def _by_cosines(features: Tensor, importance: Tensor, counts: tuple[int, ...], ks: tuple[int, ...], lam: float, parallel_k: int) -> Picks:
    on_counts, on_ks = (of_host(values, features.device, torch.int32) for values in (counts, ks))
    gram, inverse = cosines(features, on_counts)
    return Picks(by_rule("relevance", gram, importance, on_counts, on_ks, max(ks), lam, parallel_k), _finite(inverse, importance))


def by_rule(rule: str, gram: Tensor, weight: Tensor, counts: Tensor, ks: Tensor, most: int, lam: float, parallel_k: int = 1) -> Tensor:
    """[B, most], int64: picks in one launch, by cosines [B, N, stride] and contiguous fp32 weights [B, N]."""
    batch, tokens, stride = gram.shape
    order = torch.full((batch, most), -1, device=gram.device)
    held, warps = held_by(tokens)
    _picks[(batch,)](gram, weight, counts, ks, order, tokens, stride, most, lam, 1 - lam, parallel_k, RULE=rule, BN=held, num_warps=warps, num_stages=1)
    return order


def held_by(tokens: int) -> tuple[int, int]:
    """Lanes and warps of a program that holds all tokens in registers."""
    lanes = max(256, triton.next_power_of_2(tokens))
    return lanes, min(32, max(4, lanes // 512))


def _by_steps(features: Tensor, importance: Tensor, counts: tuple[int, ...], ks: tuple[int, ...], lam: float, parallel_k: int) -> Picks:
    batch, tokens, width = features.shape
    device = features.device
    on = [of_host(values, device, torch.int32) for values in (counts, ks)]
    inverse = _inverse(features, features, features, on[0], 1, False)
    parts, most = -(-tokens // ROWS), max(ks)
    keys = [torch.empty(batch, parts, dtype=torch.int64, device=device) for _ in range(2)]
    score, nearest = torch.empty_like(importance), torch.empty_like(importance)
    order = torch.full((batch, most), -1, device=device)
    for t in range(-1, most):
        _step[(parts, batch)](
            features, inverse, importance, score, nearest, keys[t % 2], keys[(t + 1) % 2], *on, order, t, tokens, width, most, parts,
            *features.stride()[:2], lam, 1 - lam, parallel_k, PARTS=min(1024, triton.next_power_of_2(parts)), ROWS=ROWS, BD=COLUMNS, num_warps=4,
        )  # fmt: skip
    return Picks(order, _finite(inverse, importance))


def _halves(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two numbers for each, those of tokens behind their count being 0, and one over the norms; features that need no split, and have boxes, twice."""
    interprets = bool(triton.knobs.runtime.interpret)  # which multiplies no BF16
    whole = (torch.float16,) if interprets else (torch.float16, torch.bfloat16)
    boxes = all(s > 0 and s * features.element_size() % 16 == 0 for s in features.stride()[:2]) and features.data_ptr() % 16 == 0
    if features.dtype in whole and boxes:
        return features, features, _inverse(features, features, features, counts, features.shape[2], False)
    padded = -(-features.shape[2] // WIDTH) * WIDTH
    half = torch.float16 if interprets or features.dtype == torch.float16 else torch.bfloat16
    high, low = (torch.empty(*features.shape[:2], padded, dtype=half, device=features.device) for _ in range(2))
    inverse = _inverse(features, high, low, counts, padded, True)
    # the second halves of 16-bit numbers are 0
    return high, high if features.dtype == half else low, inverse


def _inverse(features: Tensor, high: Tensor, low: Tensor, counts: Tensor, padded: int, split: bool) -> Tensor:
    batch, tokens, width = features.shape
    inverse = torch.empty(batch, tokens, dtype=torch.float32, device=features.device)
    _prepare[(tokens, batch)](
        features, high, low, inverse, counts, tokens, width, max(padded, width), *features.stride()[:2], SPLIT=split, BD=1024, num_warps=4
    )
    return inverse


@cache
def _shared_bytes(device: torch.device) -> int:
    """What a program may have of its multiprocessor's memory; to ask the driver takes longer than the kernels do."""
    if device.type != "cuda":
        return 1 << 16
    found: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return found
