"""What block drafts are trained on: how far a slot's distribution is from the text's next token or from the target's distribution.

Shapes: N blocks, K slots of a block that draft a token, r rows (slots of several blocks), H hidden, Vd the draft's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..training.losses import Teacher, divergence, dpace_weights

# ce is of the text; kl, tv, lk_alpha and lk_hybrid are `training.losses.divergence`'s
Kind = Literal["ce", "kl", "tv", "lk_alpha", "lk_hybrid", "ce_tv", "e2e_tv"]
Weighting = Literal["decay", "dpace"]

# logits of a piece; of several pieces none are kept, but computed again for the gradient
PIECE = 1 << 26
# DSpark's mixture of cross entropy and L1, which is twice the total variation
CE_SHARE, TV_SHARE = 0.1, 1.8


@dataclass
class Terms:
    """Of each row.

    Args:
        cross: cross entropy with the label; 0 where it is no token of the draft's.
        apart: divergence from the target, total variation for the kinds that are made of it; 0 without a target.
        hit: the first choice is the label, bool.
        accepted: sum min(p, q), without gradient: the chance that a token drawn from q is accepted; 0 without a target.
    """

    cross: Tensor
    apart: Tensor
    hit: Tensor
    accepted: Tensor


def terms(kind: Kind, hidden: Tensor, labels: Tensor, logits: Callable[[Tensor, int, int], Tensor], told: Teacher | None, rows: Tensor, width: int) -> Terms:
    """Terms of rows, in pieces.

    Args:
        hidden: [r, H].
        labels: [r], int64, among the draft's tokens, -1 where it is none of them.
        logits: gives [piece, Vd] of hidden [piece, H] that are rows start to stop.
        told: what the target says; None: nobody asks.
        rows: [r], int64: which of the teacher's tokens each is compared with.
        width: Vd.
    """
    far = kind if kind in ("kl", "tv", "lk_alpha", "lk_hybrid") else "tv"

    def piece(hidden: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        label = labels[start:stop]
        scores = logits(hidden, start, stop).float()
        cross = (scores.logsumexp(-1) - scores.gather(1, label.clamp(min=0)[:, None])[:, 0]) * (label >= 0)
        hit = scores.argmax(-1) == label
        if told is None:
            nothing = torch.zeros_like(cross)
            return cross, nothing, hit, nothing
        of, total = told.logits[rows[start:stop]], told.total[rows[start:stop]]
        apart = divergence(scores, of, total, far)
        accepted = 1 - (apart if far == "tv" else divergence(scores.detach(), of, total, "tv")).detach()
        return cross, apart, hit, accepted

    step = max(1, PIECE // width)
    if len(hidden) <= step:
        return Terms(*piece(hidden, 0, len(hidden)))
    pieces = [checkpoint(piece, part, at * step, at * step + len(part), use_reentrant=False) for at, part in enumerate(hidden.split(step))]
    return Terms(*(torch.cat(parts) for parts in zip(*pieces)))


def per_slot(kind: Kind, weighting: Weighting, gamma: float, of: Terms, labels: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each slot summed over blocks, what all of it is divided by, and each slot's weights.

    Args:
        gamma: slots over which weights fall to 1 / e, with `decay`.
        of: terms [N, K].
        labels: [N, K].
        alive: [N, K], bool: the slot's label is text to learn, and so are those of all slots before.

    Returns:
        sums [K] with gradient, count [], weights [N, K].
    """
    if kind == "e2e_tv":  # the share of a block that is not accepted: the mean over slots of 1 - prod_{i <= s} (1 - tv_i)
        blocks = alive[:, :1].float()
        reached = (1 - of.apart).where(alive, 1.0).cumprod(1)
        return ((1 - reached) * blocks / alive.shape[1]).sum(0), blocks.sum(), blocks.expand(alive.shape)
    # all that the target puts outside the draft's vocabulary is lost to tv, and says nothing to what compares with the rest
    counted = alive if kind in ("tv", "ce_tv") else alive & (labels >= 0)
    if weighting == "dpace":
        weights = dpace_weights(of.cross.where(labels >= 0, torch.inf), alive) * counted
    else:
        weights = (-torch.arange(alive.shape[1], device=alive.device) / gamma).exp() * counted
    loss = of.cross if kind == "ce" else CE_SHARE * of.cross + TV_SHARE * of.apart if kind == "ce_tv" else of.apart
    return (weights * loss).sum(0), weights.sum(), weights
