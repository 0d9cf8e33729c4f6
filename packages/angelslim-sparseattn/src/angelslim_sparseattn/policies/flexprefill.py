"""FlexPrefill: each head keeps as many columns and diagonals, or blocks, as hold a share of attention.

Source: arXiv:2502.20766.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..estimators import block_sums, diagonal_sums, last_attention, means, pooled, products
from ..patterns import causal, own, sink
from ..prefill import Kept, Prefill
from ..selectors import count_to_mass
from .base import MOST_TOKENS, Policy


class FlexPrefill(Policy):
    """Query-aware where mean queries and keys foretell the last block's attention, else columns and diagonals."""

    looks_ahead: ClassVar[bool] = True

    gamma: float = Field(0.9, ge=0, le=1, description="share of attention to keep")
    tau: float = Field(0.1, ge=0, le=1, description="heads whose forecast diverges less are query-aware")
    min_budget: int = Field(1024, ge=1, le=MOST_TOKENS, description="tokens that columns, and diagonals, amount to at least")
    exact_slash: bool = Field(False, description="keep both block diagonals that a token diagonal crosses")

    def scratch_bytes(self, s: Prefill) -> int:
        return 12 * s.block * s.kv_len + 40 * s.rows * s.columns

    def keep(self, s: Prefill) -> Kept:
        least = -(-self.min_budget // s.block)
        if s.kv_len <= max(2, least) * s.block:
            return Kept(causal(s))
        attention = last_attention(s, s.block)
        vertical, slash = attention.mean(1), diagonal_sums(attention) / attention.shape[1]
        vertical_b, slash_b = block_sums(vertical, s.block), block_sums(slash, s.block)
        forecast = (products(means(s.q[:, -s.block :], s.block)[:, -1:], means(s.k, s.block))[:, 0] * s.scale).softmax(-1)
        aware = _divergence(forecast, vertical_b) < self.tau
        n_v, n_s = ((count_to_mass(of, self.gamma) // s.block + 1).clamp(min=least) for of in (vertical, slash))
        n_v, n_s = (torch.where(aware, least, n) for n in (n_v, n_s))
        columns, offsets = (_first(of, n) for of, n in ((vertical_b, n_v), (slash_b, n_s)))
        if self.exact_slash:
            offsets[:, 1:] |= offsets[:, :-1].clone()
        back = (s.last_P1 - s.j).clamp(min=0)
        cells = columns[:, None] | offsets[:, back] | sink(s, 1) | own(s)
        return Kept(cells | (aware[:, None, None] & self._aware(s)))

    def _aware(self, s: Prefill) -> Tensor:
        """The heaviest blocks of the whole map, up to a share gamma of it."""
        mass = pooled(s).masked_fill(~causal(s), -torch.inf).softmax(-1).flatten(1)
        order = mass.sort(dim=-1, descending=True, stable=True)
        taken = order.values.cumsum(-1) <= self.gamma * s.rows
        return torch.zeros_like(taken).scatter_(-1, order.indices, taken).unflatten(1, (s.rows, s.columns))


def _first(score: Tensor, count: Tensor) -> Tensor:
    """The `count` [H] highest of each row [H, P], the first place among them."""
    score = score.clone()
    score[:, 0] = torch.inf
    order = score.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(score.shape[-1], device=score.device)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, places < count[:, None])


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions over the last dimension."""
    middle = (a + b) / 2
    each = [(torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1) for x in (a, b)]
    return ((each[0] + each[1]) / 2).clamp(min=0).sqrt()
