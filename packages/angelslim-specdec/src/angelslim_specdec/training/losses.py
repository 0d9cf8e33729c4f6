"""How far a draft is from its target, token by token.

P is the target's distribution over the draft's vocabulary alone, p the same without renormalising (what is outside is lost), q the draft's.
`alpha = sum min(p, q)` is the share of the draft's own samples that verification accepts.

Shapes: N tokens, H hidden, V vocabulary, Vd the draft's, M blocks of S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..drafts.base import Heads

# ce: -sum P log q; kl: that less P's entropy; tv: 1 - alpha; lk_alpha: -log alpha; lk_hybrid: kl and tv, the better the draft the more tv
Divergence = Literal["ce", "kl", "tv", "lk_alpha", "lk_hybrid"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
# how fast lk_hybrid turns from kl to tv
HYBRID_RATE = 3.0
# elements of a matrix of logits that are worked on at once
CHUNK_ELEMENTS = 2**25


@dataclass
class Teacher:
    """What the target says of N tokens.

    Args:
        logits: [N, Vd], on the draft's vocabulary.
        total: [N], fp32: log of the sum over all V of exp(logit).
        best: [N], int64: the target's id of its first choice.
    """

    logits: Tensor
    total: Tensor
    best: Tensor


@torch.no_grad()
def teacher(final: Tensor, heads: Heads, ids: Tensor | None) -> Teacher:
    """The target's word on what its head reads, [N, H].

    Args:
        ids: [Vd], the target's id of each of the draft's tokens; None: all V.
    """
    found = []
    for part in final.split(max(1, CHUNK_ELEMENTS // len(heads.head))):
        logits = heads.logits(part)
        found.append((logits if ids is None else logits[:, ids], logits.float().logsumexp(-1), logits.argmax(-1)))
    return Teacher(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def divergence(logits: Tensor, of: Tensor, total: Tensor, kind: str) -> Tensor:
    """[N], fp32, from the draft's logits [N, Vd] and a teacher's.

    Source: EAGLE-3 (arXiv:2503.01840) for ce, LK losses (`lk_alpha`, `lk_hybrid`) as engines' trainers define them.
    """
    log_q = logits.float().log_softmax(-1)
    loss = torch.zeros((), device=logits.device)
    if kind in ("ce", "kl", "lk_hybrid"):
        log_P = of.float().log_softmax(-1)
        P = log_P.exp()
        loss = -(P * log_q).sum(-1)
        if kind != "ce":
            loss = loss + (P * log_P).sum(-1)
    if kind in ("tv", "lk_alpha", "lk_hybrid"):
        alpha = torch.minimum(of.float() - total[:, None], log_q).exp().sum(-1)
        if kind == "tv":
            return 1 - alpha
        if kind == "lk_alpha":
            return -alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()
        share = (-HYBRID_RATE * alpha.detach()).exp()
        loss = share * loss + (1 - share) * (1 - alpha)
    return loss


class _TokenLosses(torch.autograd.Function):
    """Keeps one matrix [N, Vd] in the dtype of the computation for the way back, and none in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, of: Tensor, total: Tensor, rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        losses, best, slopes = [], [], []
        for part, at in zip(hidden.split(chunk := max(1, CHUNK_ELEMENTS // len(weight))), rows.split(chunk), strict=True):
            logits = functional.linear(part, weight)
            with torch.enable_grad():
                leaf = logits.detach().float().requires_grad_()
                loss = divergence(leaf, of[at], total[at], kind)
                slopes.append(torch.autograd.grad(loss.sum(), leaf)[0].to(logits.dtype))
            losses.append(loss.detach())
            best.append(logits.argmax(-1))
        ctx.save_for_backward(hidden, weight, torch.cat(slopes))
        found = torch.cat(losses), torch.cat(best)
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, slopes = ctx.saved_tensors
        slopes = slopes * upstream[0][:, None].to(slopes.dtype)
        to_head = (slopes.T @ hidden.to(slopes.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return (slopes @ weight.to(slopes.dtype)).to(hidden.dtype), to_head, None, None, None, None


def token_losses(hidden: Tensor, weight: Tensor, told: Teacher, rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Losses of a draft's head, without ever holding all its logits in fp32.

    Args:
        hidden: [N, H], what the head reads.
        weight: [Vd, H], the head.
        rows: [N], int64: which of the teacher's tokens each is compared with.

    Returns:
        [N], fp32, with gradient to hidden and weight; and [N], int64, each token's first choice among the Vd.
    """
    return _TokenLosses.apply(hidden, weight, told.logits, told.total, rows, kind)


def e2e_tv(tv: Tensor, valid: Tensor) -> Tensor:
    """1 - (expected accepted tokens) / S of each block [M], from `tv` [M, S]; slots that are not valid count as accepted."""
    return 1 - (1 - tv).where(valid, 1.0).cumprod(-1).mean(-1)


def dpace_weights(ce: Tensor, valid: Tensor, floor: float = 0.5) -> Tensor:
    """D-PACE: how much each slot matters to the accepted length [M, S], without gradient, from cross-entropies [M, S].

    c = exp(-ce) is drawn towards one, to (1 - floor) c + floor; w_s = sum over r >= s of the product of c_1 .. c_r. Slots not valid weigh nothing.
    """
    reached = ((1 - floor) * (-ce.detach()).exp() + floor).where(valid, 1.0).cumprod(-1) * valid
    return reached.flip(-1).cumsum(-1).flip(-1) * valid
