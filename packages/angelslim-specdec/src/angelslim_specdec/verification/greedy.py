"""Chains, greedily: what is proposed stays while it is what the target would have said."""

from __future__ import annotations

import torch
from torch import Tensor


def leading(hits: Tensor, counts: Tensor | None) -> Tensor:
    """How many hits [B, K], bool, a row begins with, of its first `counts` [B]; [B], int64."""
    if counts is not None:
        hits = hits & (torch.arange(hits.shape[1], device=hits.device) < counts[:, None])
    return hits.long().cumprod(-1).sum(-1)


def greedy(choices: Tensor, tokens: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Accept the longest prefix of the proposed tokens that the target chooses itself.

    Args:
        choices: [B, K + 1], int64: the target's choice after the last confirmed token, and after each proposed one.
        tokens: [B, K], int64.
        counts: [B], int64: how many of a row's tokens are real; None: all.

    Returns:
        accepted: [B], int64.
        following: [B], int64: the target's choice after those accepted.
    """
    accepted = leading(choices[:, : tokens.shape[1]] == tokens, counts)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]
