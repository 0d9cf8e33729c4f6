"""Policies by head: each head of a layer keeps what its own policy says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from angelslim_core.errors import UsageError

from ..patterns import causal
from ..prefill import Kept, Prefill
from .base import Policy


class Hybrid(Policy):
    """Some heads follow policies of their own, the others `rest`; None keeps everything.

    How far attention may skip blocks while it runs is one number a sequence, so that all policies must agree on it.
    """

    looks_ahead: ClassVar[bool] = True  # as soon as one of them does

    rest: Policy | None
    parts: tuple[tuple[tuple[int, ...], Policy | None], ...]

    @model_validator(mode="after")
    def _one_delta(self) -> Hybrid:
        if len({getattr(p, "delta", -1.0) for p in (self.rest, *(p for _, p in self.parts))}) > 1:
            raise ValueError("delta skips blocks for all heads of a layer: set it to the same, or below 0, in every policy of the layer")
        return self

    def keep(self, s: Prefill) -> Kept:
        heads = len(s.q)
        taken = sorted(head for own, _ in self.parts for head in own)
        if taken[-1] >= heads:
            raise UsageError(550, "hybrid", f"names head {taken[-1]} of a layer with {heads}")
        rest = tuple(head for head in range(heads) if head not in taken)
        found = [(own, _of_heads(s, own, policy)) for own, policy in [(rest, self.rest), *self.parts] if own]
        cells = torch.zeros(heads, s.rows, s.columns, dtype=torch.bool, device=s.q.device)
        rank = s.j.expand(cells.shape).clone() if any(k.rank is not None for _, k in found) else None
        for own, kept in found:
            cells[[*own]] = kept.cells.expand(len(own), -1, -1)
            if rank is not None and kept.rank is not None:
                rank[[*own]] = kept.rank.to(rank.dtype)
        return Kept(cells, rank, *_joined(found, heads, s.rows), delta=found[0][1].delta)


def _of_heads(s: Prefill, heads: Sequence[int], policy: Policy | None) -> Kept:
    """What the policy keeps for these heads alone, each beside a copy of its keys and values."""
    if policy is None:
        return Kept(causal(s))
    kv = [head // s.groups for head in heads]
    return policy.keep(replace(s, q=s.q[[*heads]], k=s.k[kv], v=s.v[kv]))


def _joined(found: Sequence[tuple[Sequence[int], Kept]], heads: int, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Counts [Hq, Pq] of single keys and their positions, in the order of heads."""
    singles = [(own, k.token_counts, k.tokens) for own, k in found if k.token_counts is not None and k.tokens is not None]
    if not singles:
        return None, None
    counts = singles[0][1].new_zeros(heads, rows)
    by_head: dict[int, Tensor] = {}
    for own, of_heads, tokens in singles:
        counts[[*own]] = of_heads
        by_head.update(zip(own, tokens.split(of_heads.sum(1).tolist()), strict=True))
    return counts, torch.cat([by_head[head] for head in sorted(by_head)])
