"""Where an answer ends: at a stop token, which counts as its last, or when its tokens are used up.

Shapes: B rows, W tokens of a round, s stop tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cut(tokens: Tensor, counts: Tensor, remaining: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """How many of a round's tokens stay, and which rows have ended; of fixed shape and without host sync.

    Args:
        tokens: [B, W], int64.
        counts: [B], int64: how many of them are real.
        remaining: [B], int64: how many more the row may have; a row with 0 keeps nothing.
        stops: [s], int64, s may be 0.

    Returns:
        kept: [B], int64: a stop token inside the run ends it.
        ended: [B], bool.
    """
    number = torch.arange(tokens.shape[1], device=tokens.device)
    kept = torch.minimum(counts, remaining)
    is_stop = (tokens[..., None] == stops).any(-1) & (number < kept[:, None])
    before_stop = torch.where(is_stop, number, tokens.shape[1]).amin(-1)
    return torch.minimum(kept, before_stop + 1), (kept >= remaining) | (before_stop < kept)
