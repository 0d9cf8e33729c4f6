"""How many blocks a row may select, beside those it always keeps.

p is a row's last own block, P the blocks of the whole prompt, so that a prompt prefilled in chunks gets the same budgets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# what 0.1 * 30 and its like may be off by
_SLACK = 1e-9


def share(rate: float, blocks: int) -> int:
    """ceil(rate * blocks), at least 1."""
    return max(1, math.ceil(rate * blocks - _SLACK))


def decayed(p: Tensor, blocks: int, start: int, alpha: float) -> Tensor:
    """`start` for rows p < start, which makes them dense; from there linearly down to alpha * start in the last row.

    Source: arXiv:2603.06274, position decay as in the authors' code.
    """
    if blocks - start <= 1:
        return torch.full_like(p, start)
    t = (p - start).double() / (blocks - start - 1)
    falling = (start + t * (alpha * start - start) + _SLACK).floor().long().clamp(1, start)
    return torch.where(p < start, start, falling)


def code_start(blocks: int) -> int:
    """Where decay starts: everything below 56 blocks, a fifth and 30 below 160, a tenth and 30 above."""
    if blocks < 56:
        return blocks
    return blocks // 5 + 30 if blocks < 160 else blocks // 10 + 30


def paper(p: Tensor, blocks: int, start: float, mu: float) -> Tensor:
    """ceil(start - start * (1 - mu) * p / P), the decay as the paper (arXiv:2603.06274) writes it."""
    return (start - start * (1 - mu) * p.double() / blocks - _SLACK).ceil().long().clamp(min=1)


def paper_start(blocks: int, tokens: int) -> float:
    """A fifth of the blocks up to 16K tokens, a tenth above."""
    return blocks * (0.2 if tokens <= 16384 else 0.1)
