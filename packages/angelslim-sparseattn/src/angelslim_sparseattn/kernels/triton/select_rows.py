"""Rows of scores become lists: a program holds a row in registers, finds the least score that is kept by bisecting its bits, and writes the list."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...block_index import Lists, column_dtype
from ...prefill import Prefill
from ..select_rows import Rule, bound, counts_of, offsets

MODES = {"top_k": 0, "top_p": 1, "at_least": 2}


@triton.jit
def _row(i, j, off, q_len, BLOCK: tl.constexpr):
    """First and last own block of query block i; which blocks are causal."""
    first = (off + i * BLOCK) // BLOCK
    last = (off + tl.minimum((i + 1) * BLOCK, q_len) - 1) // BLOCK
    return first, last, j <= last


@triton.jit
def _bits(x):
    """Whole numbers that are ordered as the scores are; 0 is below them all."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def _select(
    score, budget, counts, ptr, col, turns, rows, columns, off, q_len, ss_h, ss_r, share, slope, first_blocks, near_blocks, last_queries,
    MODE: tl.constexpr, WRITE: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i, h = tl.program_id(0), tl.program_id(1)
    j = tl.arange(0, BP)
    first, last, causal = _row(i, j, off, q_len, BLOCK)
    own = causal & (j >= first)
    forced = own | (causal & ((j < first_blocks) | (j > last - near_blocks)))
    # rows of the last queries keep everything
    forced = forced | (j < tl.where(tl.minimum((i + 1) * BLOCK, q_len) > q_len - last_queries, last + 1, 0))
    free = causal & ~forced
    x = tl.load(score + h.to(tl.int64) * ss_h + i.to(tl.int64) * ss_r + j, causal, 0.0)
    key = tl.zeros([BP], tl.uint32)
    if MODE == 2:
        kept = forced | (causal & (x > 0) & (x >= share * tl.max(tl.where(causal, x, 0.0), 0)))
    else:
        least = tl.full([], 0, tl.uint32)
        step = tl.full([], 0x80000000, tl.uint32)
        if MODE == 0:
            key = tl.where(free, _bits(x), 0)
            k = tl.load(budget + i)
            for _ in range(32):
                higher = least | step
                least = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, least)
                step = step >> 1
            above = free & (key > least)
            level = free & (key == least)
            kept = forced | above | (level & (tl.cumsum(level.to(tl.int32), 0) <= k - tl.sum(above.to(tl.int32), 0)))
        else:
            # the sign says which blocks come first
            mass = tl.abs(x)
            key = tl.where(free, x.to(tl.uint32, bitcast=True), 0)
            open_mass = tl.where(free, mass, 0.0)
            base = tl.sum(tl.where(forced, mass, 0.0), 0)
            of_row = share * (1 - slope * last.to(tl.float32))
            goal = of_row * (base + tl.sum(open_mass, 0))
            for _ in range(32):
                higher = least | step
                least = tl.where(base + tl.sum(tl.where(key >= higher, open_mass, 0.0), 0) >= goal, higher, least)
                step = step >> 1
            above = free & (key > least)
            level = free & (key == least)
            before = base + tl.sum(tl.where(above, open_mass, 0.0), 0)
            before += (tl.cumsum(level.to(tl.int32), 0) - 1).to(tl.float32) * (least & 0x7FFFFFFF).to(tl.float32, bitcast=True)
            kept = forced | above | (level & (before < goal))
            if of_row >= 1:
                kept = causal
    row = h * rows + i
    if WRITE:
        tl.store(col + tl.load(ptr + row) + tl.cumsum(kept.to(tl.int32), 0) - 1, j.to(col.dtype.element_ty), kept)
    else:
        tl.store(counts + row, tl.sum(kept.to(tl.int64), 0))
    if ORDERED:
        # own blocks, other forced ones, then by mass; the highest is first
        turn = tl.where(kept, (key ^ 0x80000000).to(tl.int32, bitcast=True), -0x80000000)
        turn = tl.where(forced, tl.where(own, 0x7FFFFFFF, 0x7FFFFFFE), turn)
        tl.store(turns + row.to(tl.int64) * columns + j, turn, j < columns)


@triton.jit
def _compact(
    cells, values, ptr, col, rows, columns, off, q_len, cs_h, cs_r, vs_h, vs_r,
    VALUES: tl.constexpr, OWN_FIRST: tl.constexpr, BLOCK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i, h = tl.program_id(0), tl.program_id(1)
    first, last, _ = _row(i, i, off, q_len, BLOCK)
    at = tl.load(ptr + h * rows + i)
    begin = at
    if OWN_FIRST:
        at += last - first + 1
    for start in range(0, columns, BP):
        j = start + tl.arange(0, BP)
        kept = tl.load(cells + h.to(tl.int64) * cs_h + i.to(tl.int64) * cs_r + j, j < columns, 0) != 0
        value = j
        if VALUES:
            value = tl.load(values + h.to(tl.int64) * vs_h + i.to(tl.int64) * vs_r + j, kept, 0)
        if OWN_FIRST:
            own = kept & (j >= first)
            tl.store(col + begin + j - first, value.to(col.dtype.element_ty), own)
            kept = kept & (j < first)
        tl.store(col + at + tl.cumsum(kept.to(tl.int32), 0) - 1, value.to(col.dtype.element_ty), kept)
        at += tl.sum(kept.to(tl.int32), 0)


def select_rows(s: Prefill, score: Tensor, rule: Rule) -> Lists:
    """As the reference; lists whose lengths depend on scores are as long as causality allows."""
    heads, rows, columns = score.shape
    width = max(256, triton.next_power_of_2(columns))  # fewer variants to compile
    options = {"MODE": MODES[rule.mode], "ORDERED": rule.ordered, "BLOCK": s.block, "BP": width, "num_warps": min(16, max(1, width // 512))}
    sizes = (rows, columns, s.off, s.q_len, *score.stride()[:2], float(rule.share), float(rule.slope), *rule.blocks(s.block), rule.n_last)
    device = score.device
    with torch.cuda.device_of(score):
        if rule.mode == "top_k":
            known = counts_of(s.span, rule)
            ptr, budget = offsets(known, heads, device), known.budget(device)
            col = torch.empty(heads * known.total, dtype=torch.int32, device=device)
            _select[(rows, heads)](score, budget, ptr, ptr, col, col, *sizes, WRITE=True, **options)
            return Lists(ptr, col)
        counts = torch.empty(heads * rows, dtype=torch.int64, device=device)
        turns = torch.empty(score.shape, dtype=torch.int32, device=device) if rule.ordered else counts
        _select[(rows, heads)](score, counts, counts, counts, counts, turns, *sizes, WRITE=False, **options)
        if rule.ordered:
            order = turns.sort(dim=-1, descending=True, stable=True).indices
            cells = torch.arange(columns, device=device) < counts.view(heads, rows, 1)
            return compact(s, cells, False, order)._replace(order="priority")
        ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        most = heads * bound(s.span)
        col = torch.empty(most, dtype=column_dtype(most, columns), device=device)
        _select[(rows, heads)](score, counts, counts, ptr, col, col, *sizes, WRITE=True, **options)
    return Lists(ptr, col, False)


def compact(s: Prefill, cells: Tensor, own_first: bool, values: Tensor | None) -> Lists:
    """As the reference; the list is as long as causality, or all cells, allow."""
    heads, rows, columns = cells.shape
    ptr = torch.nn.functional.pad(cells.sum(-1).flatten().cumsum(0), (1, 0))
    of_blocks = values is None or values.dim() == 3
    most = heads * (bound(s.span) if of_blocks else rows * columns)
    col = torch.empty(most, dtype=column_dtype(most, columns) if of_blocks else torch.int32, device=cells.device)
    bytes_ = cells.view(torch.uint8)
    looked_up = bytes_ if values is None else values if values.dim() == 3 else values[:, None].expand(cells.shape)
    with torch.cuda.device_of(cells):
        _compact[(rows, heads)](
            bytes_, looked_up, ptr, col, rows, columns, s.off, s.q_len, *bytes_.stride()[:2], *looked_up.stride()[:2],
            VALUES=values is not None, OWN_FIRST=own_first, BLOCK=s.block, BP=1024, num_warps=4,
        )  # fmt: skip
    return Lists(ptr, col, False, "priority" if own_first else "ascending")
