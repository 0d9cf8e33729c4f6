"""Greedy picks by a rule on a GPU: all cosines by tensor cores, a launch for the scores of the first pick, and a launch for all picks.

A pick of SCOPE's changes what covers a token only where it is nearer to it than all picks before, of which there are fewer from pick to pick, about N / t
at the t-th: those tokens alone, a row of cosines each, are taken from the gains of the others. Behind each of the first picks, which change most, gains
are summed anew by many programs. Cosines are whole numbers of 2**-24 there, so that both ways give the same gains to the bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import of_host
from ..greedy import GRID, Rule
from ..mmr import GRAM_BYTES, stacked
from .mmr import _key, _number, by_rule, cosines, held_by

# tokens whose rows are taken from gains at a time
ROWS = 8
# picks behind which gains are summed anew
EARLY = 16


@triton.jit
def _first(gram, first, counts, tokens, stride, COVERING: tl.constexpr, GRID: tl.constexpr, BN: tl.constexpr):
    """A token's row: the cosine to the nearest other, less than none; or, once it is in whole numbers, the sum of those above 0."""
    i, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(counts + b)
    gram += (b * tokens + i) * stride
    if i < count:
        nearest = tl.full([BN], -1.0, tl.float32)
        total = tl.zeros([BN], tl.int64)
        for start in range(0, count, BN):
            n = start + tl.arange(0, BN)
            row = tl.load(gram + n, n < count, -1.0)
            if COVERING:
                whole = tl.floor(row * GRID + 0.5).to(tl.int32)
                tl.store((gram + n).to(tl.pointer_type(tl.int32)), whole, n < count)
                total += tl.maximum(whole, 0).to(tl.int64)
            else:
                nearest = tl.maximum(nearest, tl.where(n == i, -1.0, row))
        if COVERING:
            tl.store(first + b * tokens + i, tl.sum(total, 0))
        else:
            tl.store(first + b * tokens + i, -tl.max(nearest, 0))


@triton.jit
def _gains(gram, covered, gains, counts, tokens, stride, BN: tl.constexpr):
    """What a token would add to what is covered."""
    i, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(counts + b)
    gram += (b * tokens + i) * stride
    if i < count:
        total = tl.zeros([BN], tl.int64)
        for start in range(0, count, BN):
            n = start + tl.arange(0, BN)
            row = tl.load(gram + n, n < count, 0)
            total += tl.maximum(row - tl.load(covered + b * tokens + n, n < count, 0), 0).to(tl.int64)
        tl.store(gains + b * tokens + i, tl.sum(total, 0))


@triton.jit(do_not_specialize=["first", "last"])
def _cover(
    gram, weight, gains, covered, changes, counts, ks, order, first, last, tokens, stride, most,
    ALONE: tl.constexpr, TIMES: tl.constexpr, GRID: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Picks of a pool, which keeps for each token what covers it, and what it would add; or one, behind which that is summed anew."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    count = tl.load(counts + b)
    free = n < count
    gram += b * tokens * stride
    changes += b * 3 * tokens
    own = tl.load(weight + b * tokens + n, free, 0.0)
    gain = tl.load(gains + b * tokens + n, free, 0)
    cover = tl.load(covered + b * tokens + n, free, 0)
    end = tl.minimum(last, tl.load(ks + b))
    for t in range(tl.minimum(first, end)):
        free = free & (n != tl.load(order + b * most + t))
    for t in range(first, end):
        score = gain.to(tl.float32) * (1.0 / GRID)
        if TIMES:
            score = score * own
        else:
            score = score + own
        best = _number(tl.max(_key(score, n, free), 0))
        tl.store(order + b * most + t, best.to(tl.int64))
        free = free & (n != best)
        # up to the stride, a multiple of 16, for whole words of 16 bytes
        row = tl.load(gram + best.to(tl.int64) * stride + n, n < stride, 0)
        nearer = (row > cover) & (n < count)
        if ALONE:
            tl.store(covered + b * tokens + n, row, nearer)
        else:
            place = tl.cumsum(nearer.to(tl.int32), 0) - 1
            tl.store(changes + place, n, nearer)
            tl.store(changes + tokens + place, cover, nearer)
            tl.store(changes + 2 * tokens + place, row, nearer)
            cover = tl.maximum(cover, row)
            # what other threads have written is read
            tl.debug_barrier()
            changed = tl.sum(nearer.to(tl.int32), 0)
            for start in range(0, changed, ROWS):
                r = start + tl.arange(0, ROWS)
                j = tl.load(changes + r, r < changed, 0)
                low = tl.load(changes + tokens + r, r < changed, 0)
                high = tl.load(changes + 2 * tokens + r, r < changed, 0)  # no different behind the last, which so takes nothing
                tile = tl.load(gram + j.to(tl.int64)[:, None] * stride + n[None, :], (r < changed)[:, None] & (n < stride)[None, :], 0)
                # max(0, tile - low) - max(0, tile - high)
                gain -= tl.sum(tl.maximum(tile, low[:, None]) - tl.maximum(tile, high[:, None]), 0) + tl.sum(high - low, 0)
            # and what is written next has been read
            tl.debug_barrier()


def picks(features: Tensor, weight: Tensor, counts: Sequence[int], ks: Sequence[int], rule: Rule, strength: float, gram_bytes: int = GRAM_BYTES) -> Tensor:
    """As the reference; pools whose cosines do not fit into `gram_bytes` together take turns."""
    most, tokens = max(ks, default=0), features.shape[1]
    if not most:
        return torch.full((len(features), 0), -1, device=features.device)
    features = features if features.stride(-1) == 1 else features.contiguous()
    weight = weight.float().contiguous()
    together = max(1, gram_bytes // (4 * tokens * (tokens + 15)))
    orders = []
    with torch.cuda.device_of(features):
        for b in range(0, len(features), together):
            on_counts, on_ks = (of_host(values[b : b + together], features.device, torch.int32) for values in (counts, ks))
            gram, _ = cosines(features[b : b + together], on_counts)
            orders.append(_by_cosines(gram, weight[b : b + together], on_counts, on_ks, most, rule, strength))
    return stacked(orders, most)


def _by_cosines(gram: Tensor, weight: Tensor, counts: Tensor, ks: Tensor, most: int, rule: Rule, strength: float) -> Tensor:
    batch, tokens, stride = gram.shape
    if rule == "damped":
        return by_rule("damped", gram, weight, counts, ks, most, float(strength))
    covering = rule != "apart"
    first = torch.empty(batch, tokens, dtype=torch.int64 if covering else torch.float32, device=gram.device)
    columns = min(1024, triton.next_power_of_2(tokens))
    _first[(tokens, batch)](gram, first, counts, tokens, stride, COVERING=covering, GRID=GRID, BN=columns, num_warps=4)
    if not covering:
        # of importance and distance the latter alone, once the first is picked
        return by_rule("relevance", gram, first, counts, ks, most, 0.0)
    order = torch.full((batch, most), -1, device=gram.device)
    changes = torch.empty(batch, 3, tokens, dtype=torch.int32, device=gram.device)
    covered = torch.zeros(batch, tokens, dtype=torch.int32, device=gram.device)
    whole = gram.view(torch.int32)
    held, warps = held_by(tokens)
    early = min(most, EARLY if gram.is_cuda else 2)  # few are quicker to interpret

    def cover(start: int, end: int, alone: bool) -> None:
        _cover[(batch,)](
            whole, weight, first, covered, changes, counts, ks, order, start, end, tokens, stride, most,
            ALONE=alone, TIMES=rule == "covering", GRID=GRID, ROWS=ROWS, BN=held, num_warps=max(8, warps), num_stages=1,
        )  # fmt: skip

    for t in range(early):
        cover(t, t + 1, True)
        _gains[(tokens, batch)](whole, covered, first, counts, tokens, stride, BN=columns, num_warps=4)
    if early < most:
        cover(early, most, False)
    return order
