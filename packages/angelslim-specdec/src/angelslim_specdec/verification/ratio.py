"""Chains, sampled by the ratio rule, which accepts the most that a lossless rule can."""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import draw
from .greedy import leading


def ratio(
    p: Tensor, tokens: Tensor, q: Tensor | None, columns: Tensor | None, uniforms: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Accept token y with probability min(1, p(y) / q(y)); at the first refusal draw from max(p - q, 0), after the last token from p.

    Lossless where each token was drawn from its q and `counts` depends on no token it cuts off.

    Args:
        p: [B, K + 1, V], fp32: the target's probabilities after the last confirmed token, and after each proposed one.
        tokens: [B, K], int64.
        q: [B, K, Vd], fp32: what each token was drawn from; None: each is a point mass.
        columns: [Vd], int64, ascending: the token of each column of q; None: all V in order.
        uniforms: [B, K + 1], in [0, 1): one for each decision, the last for the draw.
        counts: [B], int64: how many of a row's tokens are real; None: all.

    Returns:
        accepted: [B], int64.
        following: [B], int64.

    Source: arXiv:2211.17192, algorithm 1.
    """
    num_proposed, tokens = tokens.shape[1], tokens.clamp(min=0)
    of_p = p[:, :num_proposed].gather(2, tokens[..., None])[..., 0]
    of_q = torch.ones_like(of_p) if q is None else _of_draft(q, tokens, columns)
    accepted = leading((uniforms[:, :num_proposed] * of_q <= of_p) & (of_p > 0), counts)
    rest = p.gather(1, accepted[:, None, None].expand(-1, 1, p.shape[2]))[:, 0]
    if num_proposed:
        refused = accepted < (num_proposed if counts is None else counts)
        at = accepted.clamp(max=num_proposed - 1)[:, None]
        if q is None:
            left = rest.scatter(1, tokens.gather(1, at), 0.0)
        else:
            drawn_from = q.gather(1, at[..., None].expand(-1, 1, q.shape[2]))[:, 0]
            left = (rest - drawn_from if columns is None else rest.index_add(1, columns, -drawn_from)).clamp(min=0)
        # what rounding leaves of p = q may be nothing at all
        rest = torch.where((refused & (left.sum(-1) > 0))[:, None], left, rest)
    return accepted, draw(rest, uniforms[:, -1])


def _of_draft(q: Tensor, tokens: Tensor, columns: Tensor | None) -> Tensor:
    """q of each token, [B, K]; 0 where the draft has no such token."""
    if columns is None:
        return q.gather(2, tokens[..., None])[..., 0]
    at = torch.searchsorted(columns, tokens).clamp(max=len(columns) - 1)
    return q.gather(2, at[..., None])[..., 0] * (columns[at] == tokens)
