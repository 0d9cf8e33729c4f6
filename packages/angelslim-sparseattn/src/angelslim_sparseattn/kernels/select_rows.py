"""Lists from rows of scores, or from masks, without a look at the device.

Shapes: H heads, Pq and Pk blocks of queries and keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..block_index import Lists, own_blocks
from ..patterns import causal, last_rows, local, own, sink
from ..prefill import Prefill, Span
from ..selectors import at_least, top_k, top_p
from .block_sparse import triton_interprets

# rows that a program holds in registers
MOST_COLUMNS = 16384


class Rule(NamedTuple):
    """What is always kept, and how the rest is chosen.

    Args:
        mode: "top_k": the k highest of a row beside what is kept; "top_p": in the order of mass, those of negative sign first,
            while the mass before, that of what is kept counted, is below a share of the row's; "at_least": what has a share of
            the row's highest mass. Masses of 0 have no share.
        k: of each row, for "top_k".
        share: for the others.
        slope: of "top_p": what part of the share each block before a row's last own one takes from it.
        n_init, n_local, n_last: tokens, as of `patterns`; own blocks are always kept.
        ordered: whether lists are in priority order.
    """

    mode: Literal["top_k", "top_p", "at_least"]
    k: tuple[int, ...] = ()
    share: float = 0.0
    slope: float = 0.0
    n_init: int = 0
    n_local: int = 0
    n_last: int = 0
    ordered: bool = False

    def blocks(self, block: int) -> tuple[int, int]:
        """First and near blocks."""
        return -(-self.n_init // block), -(-self.n_local // block)


class Counts(NamedTuple):
    """Lengths of the lists of one head, known from the sizes alone."""

    per_row: tuple[int, ...]
    k: tuple[int, ...]
    total: int

    def budget(self, device: torch.device) -> Tensor:
        """k, int32 [Pq]."""
        return _on_device(self.k, 1, torch.int32, device)


@lru_cache(64)
def counts_of(span: Span, rule: Rule) -> Counts:
    """Of a "top_k" rule."""
    first_blocks, near = rule.blocks(span.block)
    per_row = []
    for i, k in enumerate(rule.k):
        start, end = i * span.block, min((i + 1) * span.block, span.q_len)
        last = (span.off + end - 1) // span.block
        forced = min(last + 1, first_blocks + max(near, last - (span.off + start) // span.block + 1))
        forced = last + 1 if end > span.q_len - rule.n_last else forced
        per_row.append(min(last + 1, forced + k))
    return Counts(tuple(per_row), rule.k, sum(per_row))


@lru_cache(64)
def bound(span: Span) -> int:
    """Blocks of causal attention of one head."""
    return sum((span.off + min(start + span.block, span.q_len) - 1) // span.block + 1 for start in range(0, span.q_len, span.block))


def offsets(counts: Counts, heads: int, device: torch.device) -> Tensor:
    """Where each list of that many heads begins, and the end: int64 [H * Pq + 1]."""
    return _on_device((0, *counts.per_row), heads, torch.int64, device)


@lru_cache(64)
def _on_device(values: tuple[int, ...], heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values, or their sums over that many heads where the first is 0, on the device without a wait for it."""
    found = torch.tensor(values, dtype=dtype)
    if dtype == torch.int64:
        found = torch.cat([found[:1], found[1:].repeat(heads).cumsum(0)])
    return found.to(device, non_blocking=True)


def reference(s: Prefill, score: Tensor, rule: Rule) -> Lists:
    """Lists of each row of fp32 scores [H, Pq, Pk]; what comes after a row's last position may hold anything. Ties go to the lower block."""
    allowed = causal(s)
    score = score.masked_fill(~allowed, 0)
    forced = allowed & (sink(s, rule.n_init) | local(s, rule.n_local) | own(s) | last_rows(s, rule.n_last))
    rank = None
    if rule.mode == "top_k":
        cells = forced | top_k(score, torch.tensor(rule.k, device=score.device)[:, None], allowed & ~forced)
    elif rule.mode == "at_least":
        cells = forced | at_least(score, rule.share, allowed & (score > 0))
    else:
        tier = torch.where(forced, 0, torch.where(score < 0, 1, 2))
        share = rule.share * (1 - rule.slope * own_blocks(s.q_len, s.kv_len, s.block, s.block, score.device)[1][:, None])
        cells, rank = top_p(score.abs(), share, tier, allowed.expand(score.shape))
    if not rule.ordered:
        return compact(s, cells, False, None)
    assert rank is not None
    order = rank.masked_fill(own(s), -1).masked_fill(~cells, cells.shape[-1]).argsort(dim=-1, stable=True)
    counts = cells.sum(-1)
    return Lists(_ends(counts), order[torch.arange(cells.shape[-1], device=cells.device) < counts[..., None]].int(), True, "priority")


def compact(s: Prefill, cells: Tensor, own_first: bool, values: Tensor | None) -> Lists:
    """Lists of the cells [H, Pq, Pk] that are set, ascending, or own blocks first; of `values` in their place where given.

    Args:
        values: positions [H, Pk] of keys, or blocks [H, Pq, Pk].
    """
    if own_first:
        near = own(s).expand(cells.shape)
        order = torch.where(near, -1, 0).masked_fill(~cells, 1).argsort(dim=-1, stable=True)
        col = order[torch.arange(cells.shape[-1], device=cells.device) < cells.sum(-1, keepdim=True)]
    elif values is None:
        col = cells.nonzero()[:, -1]
    else:
        col = (values if values.dim() == 3 else values[:, None].expand(cells.shape))[cells]
    return Lists(_ends(cells.sum(-1)), col.int(), True, "priority" if own_first else "ascending")


def _ends(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))


def _select_triton(s: Prefill, score: Tensor, rule: Rule) -> Lists:
    from .triton.select_rows import select_rows

    return select_rows(s, score, rule)


def _compact_triton(s: Prefill, cells: Tensor, own_first: bool, values: Tensor | None) -> Lists:
    from .triton.select_rows import compact

    return compact(s, cells, own_first, values)


def on_cpu(s: Prefill, *_: object, **__: object) -> tuple[bool, str]:
    """Where the torch forms run."""
    return s.q.device.type == "cpu", "tensors on the CPU"


def on_gpu(s: Prefill, *_: object, **__: object) -> tuple[bool, str]:
    """Where Triton's do."""
    if not s.q.is_cuda and not triton_interprets():
        return False, "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"
    return s.block & (s.block - 1) == 0, "blocks of a power of 2"


def _fits(s: Prefill, score: Tensor, rule: Rule) -> tuple[bool, str]:
    ok, why = on_gpu(s)
    return (ok, why) if not ok else (score.shape[-1] <= MOST_COLUMNS and score.stride(-1) == 1, f"no more than {MOST_COLUMNS} blocks of keys")


SELECT_ROWS = Kernel(
    "sparseattn.select_rows", reference, (Implementation("torch", reference, on_cpu), Implementation("triton", _select_triton, _fits, triton_runs))
)
COMPACT = Kernel("sparseattn.compact", compact, (Implementation("torch", compact, on_cpu), Implementation("triton", _compact_triton, on_gpu, triton_runs)))
