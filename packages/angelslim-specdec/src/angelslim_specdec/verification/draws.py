"""Draws from given uniforms, the same on every device but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens by the inverse of the cumulated weights; one of weight 0 never comes.

    Args:
        p: [..., V], fp32, weights, not all 0; they need not sum to 1.
        uniforms: [...], in [0, 1).

    Returns:
        [...], int64.
    """
    below = p.cumsum(-1, dtype=torch.float64)  # in fp32 the sum over a large vocabulary would drop rare tokens
    reached = (below > uniforms.double()[..., None] * below[..., -1:]) & (p > 0)
    # a parallel sum may end below its own last step: then nothing is reached, and the most probable token stands in
    return torch.where(reached.any(-1), reached.byte().argmax(-1), p.argmax(-1))
