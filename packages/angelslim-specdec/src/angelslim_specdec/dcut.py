"""D-Cut on the device: of all rows' proposals those most likely to be accepted are verified, in one line without padding.

Shapes: B rows, K proposed tokens a row, T = K + 1 places of a row, n proposed tokens that are verified, N = B + n tokens of a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .drafters.base import Proposal


def scores(proposal: Proposal, live: Tensor) -> Tensor:
    """How likely each token of a chain, with all before it, is to be accepted, by the draft's own word; never rises along a row.

    Of a drawn token the score says nothing: to cut a token for what it is bends the ratio rule, which then draws from p where
    max(p - q, 0) is due. The greatest of the probabilities that it was drawn from stands for it, which depends on the tokens before
    it alone. The highest scores of a batch can then be found one by one, each before its token is looked at: lossless for all rows together.

    Args:
        live: [B], bool: rows that go on; others score 0.

    Returns:
        [B, K], fp32; 0 where there is no token, and without any word of the draft 1 where there is one.
    """
    tokens = proposal.tokens
    if proposal.q is not None:
        sure = proposal.q.amax(-1)
    else:
        sure = torch.ones_like(tokens, dtype=torch.float32) if proposal.confidence is None else proposal.confidence
    real = live[:, None].expand_as(tokens)
    if proposal.counts is not None:
        real = real & (torch.arange(tokens.shape[1], device=tokens.device) < proposal.counts[:, None])
    # a product made in parallel may rise by its rounding
    return torch.where(real, sure.float().clamp(max=1).cumprod(1).cummin(1).values, 0.0)


def kept(of: Tensor, size: int) -> Tensor:
    """How many tokens of each row [B] are among the `size` highest scores [B, K] of all; of equal ones the earlier in a row comes first.

    Source: D-Cut, its count taken over proposed tokens only: what is confirmed is always verified.
    """
    rows, most = of.shape
    order = of.T.flatten().argsort(descending=True, stable=True)  # by columns, so that what is kept of a row is its beginning
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(rows * most, device=of.device))
    return (rank < size).view(most, rows).sum(0)


@dataclass(frozen=True)
class Line:
    """Rows of different length, one after the other, so that layers that compute token by token compute nothing else.

    Args:
        taken: [N], int64: place of each token of the line among the B T.
        at: [B, T], int64: where in the line each place's token is; of one that is left out, the last before it.
    """

    taken: Tensor
    at: Tensor

    @classmethod
    def of(cls, counts: Tensor, places: int, size: int) -> Line:
        """Of each row the first place and `counts` [B] more, `size` in all; without host sync."""
        there = (torch.arange(places, device=counts.device) <= counts[:, None]).flatten()
        return cls((~there).byte().argsort(stable=True)[: len(counts) + size], (there.cumsum(0) - 1).view(-1, places))

    def line(self, x: Tensor) -> Tensor:
        """[1, N, ...] of x [B, T, ...]."""
        return x.flatten(0, 1)[self.taken][None]

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, ...] of x [1, N, ...]; what was left out holds anything."""
        return x[0][self.at]
