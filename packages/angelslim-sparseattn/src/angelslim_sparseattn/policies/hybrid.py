"""Policies by head: each head of a layer keeps what its own policy says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import ClassVar

from pydantic import model_validator

from angelslim_core.errors import UsageError

from ..prefill import Kept, Prefill
from ..selection import selected, together
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
        if len({max(getattr(p, "delta", 0.0), 0.0) for p in (self.rest, *(p for _, p in self.parts))}) > 1:
            raise ValueError("delta skips blocks for all heads of a layer: set it to the same, or below 0, in every policy of the layer")
        return self

    @property
    def ordered(self) -> bool:
        return any(policy is not None and policy.ordered for policy in (self.rest, *(policy for _, policy in self.parts)))

    def scratch_bytes(self, s: Prefill) -> int:
        return 1  # of all heads at a time: each part sees to its own

    def keep(self, s: Prefill) -> Kept:
        heads = len(s.q)
        of_head = {head: policy for own, policy in self.parts for head in own}
        if max(of_head) >= heads:
            raise UsageError(550, "hybrid", f"names head {max(of_head)} of a layer with {heads}")
        runs = [(policy, list(run)) for policy, run in groupby(range(heads), lambda head: of_head.get(head, self.rest))]
        found = [selected(_of_heads(s, run), policy, self.ordered) for policy, run in runs]
        return together(found, [s.rows] * len(runs), s.rows, s.columns, s.kv_len)


def _of_heads(s: Prefill, heads: Sequence[int]) -> Prefill:
    """These neighbouring heads alone; where they are not all heads of their KV heads, each beside a copy of its keys and values."""
    q, (first, last) = s.q[heads[0] : heads[-1] + 1], (heads[0] // s.groups, heads[-1] // s.groups)
    if first == last or (heads[0] % s.groups == 0 and (heads[-1] + 1) % s.groups == 0):
        return replace(s, q=q, k=s.k[first : last + 1], v=s.v[first : last + 1])
    kv = [head // s.groups for head in heads]
    return replace(s, q=q, k=s.k[kv], v=s.v[kv])
