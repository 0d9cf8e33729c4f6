"""What block drafts are trained on: how far a slot's distribution is from the text's next token or from the target's distribution.

Shapes: N blocks, K slots of a block that draft a token, r rows (slots of several blocks), H hidden, V vocabulary, Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Kind = Literal["ce", "kl", "tv", "lk_alpha", "lk_hybrid", "ce_tv", "e2e_tv"]
Weighting = Literal["decay", "dpace"]

# logits of one piece; of several pieces none are kept, but computed again for the gradient
PIECE = 1 << 28
# of LK-hybrid: how fast it goes from KL to total variation as acceptance grows
ETA = 3.0
# of D-PACE: what a certain miss counts
FLOOR = 0.5
# DSpark's mixture of cross entropy and L1, which is twice the total variation
CE_SHARE, TV_SHARE = 0.1, 1.8


@dataclass
class Terms:
    """Of each row.

    Args:
        cross: cross entropy with the label; 0 where it is no token of the draft's.
        kl: from the target's distribution over the draft's vocabulary, renormalised.
        overlap: sum min(p, q), p not renormalised: the chance that a token drawn from q is accepted.
        hit: the first choice is the label, bool.
    """

    cross: Tensor
    kl: Tensor
    overlap: Tensor
    hit: Tensor


def terms(
    hidden: Tensor, labels: Tensor, logits: Callable[[Tensor, int, int], Tensor], teacher: Callable[[int, int], Tensor] | None, columns: Tensor | None
) -> Terms:
    """Terms of rows, in pieces.

    Args:
        hidden: [r, H].
        labels: [r], int64, among the draft's tokens, -1 where it is none of them.
        logits: gives [rows, Vd] of hidden [rows, H] that are rows start to stop.
        teacher: gives the target's [rows, V] of rows start to stop; None: kl and overlap are not asked for, and are 0.
        columns: [Vd], the target's id of each of the draft's tokens; None: its own.
    """

    def piece(hidden: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        label = labels[start:stop]
        scores = logits(hidden, start, stop).float()
        log_q = scores.log_softmax(-1)
        cross = -log_q.gather(1, label.clamp(min=0)[:, None])[:, 0] * (label >= 0)
        hit = scores.argmax(-1) == label
        if teacher is None:
            return cross, torch.zeros_like(cross), torch.zeros_like(cross), hit
        with torch.no_grad():
            theirs = teacher(start, stop).float()
            total = theirs.logsumexp(-1, keepdim=True)
            theirs = theirs if columns is None else theirs[:, columns]
            log_p = theirs.log_softmax(-1)
            p = (theirs - total).exp()
        return cross, (log_p.exp() * (log_p - log_q)).sum(-1), torch.minimum(p, log_q.exp()).sum(-1), hit

    rows = len(hidden)
    width = logits(hidden[:1].detach(), 0, 1).shape[-1] if teacher is None else teacher(0, 1).shape[-1]
    step = max(1, PIECE // width)
    if rows <= step:
        return Terms(*piece(hidden, 0, rows))
    pieces = [checkpoint(piece, hidden[at : at + step], at, min(at + step, rows), use_reentrant=False) for at in range(0, rows, step)]
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
    if kind == "e2e_tv":  # how much of a block is not accepted: 1 - mean_s prod_{i <= s} overlap_i
        blocks = alive[:, :1].float()
        reached = torch.where(alive, of.overlap, 1.0).cumprod(1)
        return ((1 - reached) * blocks / alive.shape[1]).sum(0), blocks.sum(), blocks.expand(alive.shape)
    counted = alive if kind in ("tv", "ce_tv") else alive & (labels >= 0)
    weights = _decay(gamma, alive) if weighting == "decay" else dpace(of.cross, labels, alive)
    weights = weights * counted
    return (weights * distance(kind, of)).sum(0), weights.sum(), weights


def distance(kind: Kind, of: Terms) -> Tensor:
    """Each slot's loss."""
    if kind == "ce":
        return of.cross
    if kind == "kl":
        return of.kl
    if kind == "tv":
        return 1 - of.overlap
    if kind == "lk_alpha":
        return -of.overlap.clamp(min=1e-6).log()
    if kind == "lk_hybrid":
        share = (-ETA * of.overlap.detach()).exp()
        return share * of.kl + (1 - share) * (1 - of.overlap)
    return CE_SHARE * of.cross + TV_SHARE * (1 - of.overlap)


def dpace(cross: Tensor, labels: Tensor, alive: Tensor) -> Tensor:
    """Weights [N, K]: the expected number of tokens accepted from this slot on, if each slot's chance is its label's, no less than half.

    Source: D-PACE: c_s = exp(-CE_s), c~ = (1 - FLOOR) c + FLOOR, w_s = sum_{r >= s} prod_{i <= r} c~_i.
    """
    chance = torch.where(labels >= 0, (-cross.detach()).exp(), 0.0) * (1 - FLOOR) + FLOOR
    reached = chance.cumprod(1) * alive
    return reached.flip(1).cumsum(1).flip(1)


def _decay(gamma: float, alive: Tensor) -> Tensor:
    return (-torch.arange(alive.shape[1], device=alive.device) / gamma).exp().expand(alive.shape)
