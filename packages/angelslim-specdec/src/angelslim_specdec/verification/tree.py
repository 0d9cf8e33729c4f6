"""Trees: of all paths from the last confirmed token one stays, up to where the target says something else."""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import draw


def tree_greedy(choices: Tensor, tokens: Tensor, parents: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Accept the longest path all of whose tokens are the target's choices, the first of several.

    Args:
        choices: [B, N + 1], int64: the target's choice after the last confirmed token, and after each proposed one.
        tokens: [B, N], int64, -1 where there is none.
        parents: [B, N], int64: which proposed token each follows, -1 the last confirmed one; parents come first.
        depth: of the deepest token, where it is known: less work; None: N.

    Returns:
        path: [B, depth], int64: numbers of the accepted tokens, -1 after the last.
        accepted: [B], int64: how many.
        following: [B], int64: the target's choice after them.
    """
    size = tokens.shape[1]
    depth = size if depth is None else depth
    # node 0 is the root, its own parent; i + 1 is proposed token i
    parent = torch.nn.functional.pad(parents + 1, (1, 0))
    fits = torch.nn.functional.pad(choices.gather(1, parent[:, 1:]) == tokens, (1, 0), value=True)
    level = (torch.arange(size + 1, device=tokens.device) > 0).long().expand_as(parent)
    ancestor = parent
    for _ in range(max(1, depth).bit_length()):  # each round looks twice as far up
        fits, level, ancestor = fits & fits.gather(1, ancestor), level + level.gather(1, ancestor), ancestor.gather(1, ancestor)
    accepted, last = torch.where(fits, level, -1).max(1)
    following = choices.gather(1, last[:, None])[:, 0]
    upwards = [last[:, None]]
    for _ in range(depth - 1):
        upwards.append(parent.gather(1, upwards[-1]))
    order = accepted[:, None] - 1 - torch.arange(depth, device=tokens.device)
    path = torch.where(order >= 0, torch.cat(upwards, 1).gather(1, order.clamp(min=0)) - 1, -1)
    return path, accepted, following


def tree_sample(p: Tensor, tokens: Tensor, parents: Tensor, uniforms: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from the target after each token and follow the draws as far as the tree goes.

    For children that were chosen, not drawn, this is EAGLE's rule (accept child x with probability r(x), else r(x) = 0 and
    renormalise): there, too, a child is taken with p(x), and what is drawn when all are refused is p without them.
    Of the same token twice under one parent only the first counts: to go on with the one that fits better would be a choice by draws.

    Args:
        p: [B, N + 1, V], fp32: the target's probabilities after the last confirmed token, and after each proposed one.
        tokens, parents, depth: as `tree_greedy` takes them.
        uniforms: [B, N + 1], in [0, 1).

    Returns:
        As `tree_greedy`.

    Source: arXiv:2401.15077, section 3.3.
    """
    same = (tokens[:, :, None] == tokens[:, None]) & (parents[:, :, None] == parents[:, None])
    again = same.tril(-1).any(-1)
    return tree_greedy(draw(p, uniforms), tokens.masked_fill(again, -1), parents, depth)
