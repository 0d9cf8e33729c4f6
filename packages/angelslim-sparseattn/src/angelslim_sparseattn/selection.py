"""From a policy to lists, as many heads at a time as memory allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .block_index import Lists, joined, to_cells
from .kernels.select_rows import COMPACT
from .patterns import causal, own
from .policies.base import Policy
from .prefill import Kept, Prefill

# memory that selection may take beside its result
SCRATCH_BYTES = 2**30


def selected(s: Prefill, policy: Policy | None, ordered: bool) -> Kept:
    """What the policy keeps, or without one everything, as lists of all heads, in priority order if they are `ordered`."""
    parts = list(s.parts(SCRATCH_BYTES // (4 * s.rows * s.columns if policy is None else policy.scratch_bytes(s))))
    found = [Kept(causal(part)) if policy is None else policy.keep(part) for part in parts]
    return together([_listed(part, kept, ordered) for part, kept in zip(parts, found, strict=True)], [s.rows] * len(parts), s.rows, s.columns, s.kv_len)


def together(found: Sequence[Kept], rows: Sequence[int], most: int, columns: int, keys: int) -> Kept:
    """One of several in the order of heads, or of sequences, each with lists.

    Args:
        rows: query blocks of each.
        most: query blocks that every head gets; those that are missing keep nothing.
        columns, keys: blocks, and single keys, are below these.
    """
    lists = [kept.lists for kept in found if kept.lists is not None]
    tokens = None
    if any(kept.tokens is not None for kept in found):
        singles = [Lists(torch.zeros_like(of.ptr), of.col[:0].int()) if kept.tokens is None else kept.tokens for kept, of in zip(found, lists, strict=True)]
        tokens = joined(singles, rows, most, keys)
    return Kept(lists=joined(lists, rows, most, columns), tokens=tokens, delta=found[0].delta)


def _listed(s: Prefill, kept: Kept, ordered: bool) -> Kept:
    """With lists; of cells own blocks come first in priority order."""
    if kept.lists is None:
        assert kept.cells is not None
        cells = (kept.cells | own(s)) & causal(s)
    elif (kept.lists.order == "priority") == ordered:
        return kept
    else:
        cells = to_cells(kept.lists, s.rows, s.columns)
    return kept._replace(cells=None, lists=COMPACT(s, cells.expand(len(s.q), -1, -1), ordered, None))
