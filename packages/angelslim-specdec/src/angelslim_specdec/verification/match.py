"""Chains, sampled by the match rule: the target draws, and what is proposed stays while it is what was drawn."""

from __future__ import annotations

from torch import Tensor

from .draws import draw
from .greedy import greedy


def match(p: Tensor, tokens: Tensor, uniforms: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw from the target after each prefix and accept while the draws are the proposed tokens.

    What is emitted is the target's own draws, so that any proposal, however made or cut, leaves their distribution as it is.

    Args:
        p: [B, K + 1, V], fp32: the target's probabilities after the last confirmed token, and after each proposed one.
        tokens: [B, K], int64.
        uniforms: [B, K + 1], in [0, 1).
        counts: [B], int64: how many of a row's tokens are real; None: all.

    Returns:
        accepted: [B], int64.
        following: [B], int64.
    """
    return greedy(draw(p, uniforms), tokens, counts)
