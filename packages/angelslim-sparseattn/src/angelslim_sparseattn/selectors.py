"""From scores to kept blocks. Ties go to the lower block; what is not `allowed` is never kept."""

from __future__ import annotations

import torch
from torch import Tensor


def _ranks(order: Tensor) -> Tensor:
    """Place of each block in `order`."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def top_k(score: Tensor, k: Tensor | int, allowed: Tensor) -> Tensor:
    """The k highest scores of each row; `k` broadcasts against [..., 1]."""
    order = score.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return allowed & (_ranks(order) < k)


def top_p(mass: Tensor, p: Tensor, tier: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks in order of tier, then of mass, while the mass before is less than p of the row's; and that order. A p of 1 keeps all.

    Args:
        mass: [..., Pk], not negative.
        p: broadcastable to [..., 1].
        tier: int, broadcastable to mass; what is of tier 0 is kept whatever the mass.

    Returns: bool kept and int rank, as mass.
    """
    mass = mass.masked_fill(~allowed, 0)
    order = mass.masked_fill(~allowed, -1).sort(dim=-1, descending=True, stable=True).indices
    tiers = torch.where(allowed, tier, torch.iinfo(torch.int64).max).expand_as(mass)
    order = order.gather(-1, tiers.gather(-1, order).sort(dim=-1, stable=True).indices)
    rank = _ranks(order)
    ordered = mass.gather(-1, order)
    before = (ordered.cumsum(-1) - ordered).gather(-1, rank)
    kept = (before < p * mass.sum(-1, keepdim=True)) | (tiers == 0) | (p >= 1)
    return allowed & kept, rank


def count_to_mass(mass: Tensor, p: float) -> Tensor:
    """1 + how many of the largest values [..., N] sum up to no more than p; int64 [...]."""
    return 1 + (mass.sort(dim=-1, descending=True, stable=True).values.cumsum(-1) <= p).sum(-1)


def at_least(score: Tensor, alpha: float, allowed: Tensor) -> Tensor:
    """Scores of at least alpha times the row's highest."""
    score = score.masked_fill(~allowed, -torch.inf)
    return allowed & (score >= alpha * score.amax(-1, keepdim=True))


def running_gap(score: Tensor, gap: float, group: int, step: int) -> Tensor:
    """Scores within `gap` of the running maximum, which goes `step` values at a time and begins anew every `group` values.

    Every group of finite scores keeps at least one.
    """
    length = score.shape[-1]
    steps = torch.nn.functional.pad(score, (0, -length % group), value=-torch.inf).unflatten(-1, (-1, group // step, step))
    highest = steps.amax(-1).cummax(-1).values
    return ((steps + gap >= highest[..., None]) & (steps > -torch.inf)).flatten(-3)[..., :length]
