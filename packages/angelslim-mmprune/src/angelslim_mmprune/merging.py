"""Samp: neighbours in time that sound alike become one token, and of these a DPP keeps as many as the budget has.

Shapes: P clips, N tokens of the longest, D width of the language model, K kept tokens of the clip that keeps most.

Source: Samp (preprint 202606.0741, first called SA-MAP), and for clips that merge below the budget its published code for Kimi-Audio.
Of the paper: groups, their weights, relevance and the kernel. Ours: the guards (a group without weight is a plain mean, relevance is
relative to a clip's highest), that ties go to the lower index, tokens that fit their groups alike to 2**-20 being ties, and that
groups end where a clip does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan

import torch
from torch import Tensor

from angelslim_core.errors import UsageError
from angelslim_core.kernels import Implementation, Kernel, triton_runs

from .dpp import DPP, ascending, inverse, on_cpu, on_gpu, told_apart, unit
from .finite import all_finite, norms, require
from .picking import kept
from .plan import Plan, before, of_host

# of the published run script; the paper's example has .75
THRESHOLD = 0.85
# values of a token that a program holds in registers
MOST_WIDTH = 16384


@dataclass(frozen=True)
class Samp:
    """One clip.

    Args:
        groups: of each kept token in order of time, the numbers of those that went into it, ascending.
        features: [K, D], as the input.
    """

    groups: list[list[int]]
    features: Tensor


def samp(
    features: Tensor, merge_weight: Tensor, relevance: Tensor, keep_tokens: int, threshold: float = THRESHOLD, *, executor: str = "auto"
) -> Samp:  # fmt: skip
    """Merge and prune one clip.

    Args:
        features: [N, D].
        merge_weight: [N], not negative: a token's weight in the mean of its group.
        relevance: [N], not negative: where groups are dropped, what those that stay are chosen by, next to being unlike each other.
        keep_tokens: exactly so many stay.
        threshold: mean cosine to the tokens of the open group from which on a token joins it.

    Raises:
        UsageError: shapes, keep_tokens, threshold or the sign of weights.
        NotFiniteError: features, weights or relevance are NaN or infinite.
    """
    if features.dim() != 2 or merge_weight.shape != features.shape[:1] or relevance.shape != features.shape[:1]:
        shapes = ", ".join(str([*x.shape]) for x in (features, merge_weight, relevance))
        raise UsageError(840, "samp", f"shapes {shapes}", "features [N, D], merge_weight [N], relevance [N]")
    tokens = len(features)
    if isinstance(keep_tokens, bool) or not 1 <= keep_tokens <= tokens:
        raise UsageError(843, "keep_tokens", f"{keep_tokens} of {tokens} tokens", "1 to as many as there are")
    if isnan(threshold):
        raise UsageError(844, "threshold", "NaN", "a cosine")
    if bool((merge_weight < 0).any() | (relevance < 0).any()):
        raise UsageError(845, "samp", "weights or relevance below 0", "shares of attention are not negative")
    plan = samp_plan(features[None], merge_weight[None], relevance[None], [tokens], [keep_tokens], threshold, executor=executor)
    groups: list[list[int]] = [[] for _ in range(keep_tokens)]
    assert plan.groups is not None
    for token, group in enumerate(plan.groups[0].tolist()):
        if group >= 0:
            groups[group].append(token)
    return Samp(groups, plan.apply(features[None])[0])


def samp_plan(
    features: Tensor, merge_weight: Tensor, relevance: Tensor, counts: Sequence[int], keep: Sequence[int], threshold: float,
    segments: Tensor | None = None, *, executor: str = "auto",
) -> Plan:  # fmt: skip
    """Merge and prune clips side by side; the host waits once, at the end, to hear of NaN.

    Args:
        features: [P, N, D].
        merge_weight, relevance: [P, N].
        counts, keep: tokens of each clip, and how many stay.
        segments: [P, N], int64: where it changes a group ends.
        executor: of all kernels.

    Raises:
        NotFiniteError: features, weights or relevance are NaN or infinite.
    """
    tokens, most, device = features.shape[1], max(keep, default=0), features.device
    on_device, budget = of_host(counts, device), of_host(keep, device)
    valid = before(on_device, tokens)
    finite = all_finite(valid, features, merge_weight, relevance)
    positions = torch.arange(tokens, device=device).expand(valid.shape)

    score = SAMP_GROUPS(features, on_device, threshold, segments, executor=executor)
    first = valid & (score == inf)
    found = first.sum(1, keepdim=True)

    # fewer groups than are to stay: the tokens that fit their groups least are tokens of their own again
    rank = told_apart(score).argsort(dim=1, stable=True).argsort(dim=1)
    alone = first | (rank < (budget[:, None] - found).clamp(min=0))
    head = torch.where(alone, positions, torch.where(first, positions, 0).cummax(1).values)
    group = (alone.cumsum(1) - 1).gather(1, head)
    start = torch.zeros(len(valid), tokens + 1, dtype=torch.int64, device=device)
    start.scatter_(1, torch.where(alone, group, tokens), positions)

    weight = merge_weight.to(score.dtype).masked_fill(~valid, 0)
    members = valid.to(score.dtype)
    sums = torch.zeros_like(weight).scatter_add_(1, group, weight).gather(1, group)
    sizes = torch.zeros_like(weight).scatter_add_(1, group, members)
    shares = torch.where(valid, torch.where(sums > 0, weight / sums, 1 / sizes.gather(1, group)), 0)

    # more groups than are to stay: a DPP chooses
    mean = torch.zeros_like(weight).scatter_add_(1, group, relevance.to(score.dtype).masked_fill(~valid, 0)) / sizes.clamp(min=1)
    over = found[:, 0] > budget
    merged = SAMP_MERGE(features, group, shares, torch.where(over, on_device, 0), executor=executor)
    picks = DPP(merged, mean, torch.where(over, budget, 0), found[:, 0], most, executor=executor)
    numbers = torch.arange(most, device=device)
    kept = torch.where(over[:, None], ascending(picks, tokens), torch.where(numbers < budget[:, None], numbers, -1))

    slot = torch.full((len(valid), tokens + 1), -1, device=device)
    slot.scatter_(1, torch.where(kept < 0, tokens, kept), numbers.expand(kept.shape))
    slot[:, tokens] = -1
    plan = Plan(
        torch.where(kept < 0, -1, start.gather(1, kept.clamp(min=0))),
        torch.where(valid, slot.gather(1, group), -1),
        shares.float(),
    )
    require(finite, 847, "samp")
    return plan


def plan_of_groups(opens: Tensor, valid: Tensor, keep: Sequence[int]) -> Plan:
    """Plain means of neighbours.

    Args:
        opens: [P, N], bool: tokens with which a group begins.
        valid: [P, N], bool.
        keep: how many groups of each pool stay: the first, where it has more.
    """
    group = (opens & valid).cumsum(1) - 1
    group = torch.where(valid & (group < of_host(keep, opens.device)[:, None]), group, -1)
    to = group.clamp(min=0)
    sizes = torch.zeros(opens.shape, device=opens.device).scatter_add_(1, to, (group >= 0).float())
    return Plan(kept(opens & (group >= 0), keep), group, 1 / sizes.gather(1, to).clamp(min=1))


def merge(features: Tensor, group: Tensor, shares: Tensor, counts: Tensor) -> Tensor:
    """Sums by share of the tokens of each group.

    Args:
        features: [P, N, D].
        group: int64 [P, N]: those of a group are neighbours.
        shares: [P, N].
        counts: int64 [P]: tokens of each clip; 0 of those that nobody asks for.

    Returns:
        [P, N, D] in the dtype of shares: of each group its sum; behind a clip's groups there may be anything.
    """
    out = torch.zeros(features.shape, dtype=shares.dtype, device=features.device)
    values = torch.where(before(counts, features.shape[1])[..., None], features.to(shares.dtype), 0) * shares[..., None]
    return out.scatter_add_(1, group[..., None].expand(features.shape), values)


def _merge_triton(features: Tensor, group: Tensor, shares: Tensor, counts: Tensor) -> Tensor:
    from .kernels.triton.samp import merge as on_device

    return on_device(features, group, shares, counts)


def reference(features: Tensor, counts: Tensor, threshold: float, segments: Tensor | None = None) -> Tensor:
    """Token by token, by its mean cosine to all of the open group.

    Args:
        features: [P, N, D].
        counts: int64 [P].
        threshold: as of `samp`.
        segments: [P, N]: where it changes a group ends.

    Returns:
        [P, N], FP32, or FP64 as features are: of tokens that joined a group, their mean cosine to it, themselves counted; inf of
        those that opened one, and of what is no token.
    """
    x = unit(features)
    scores = torch.full(x.shape[:2], inf, dtype=x.dtype, device=x.device)
    for p, n in enumerate(counts.tolist()):
        cosines = x[p, :n] @ x[p, :n].T
        group: list[int] = []
        for j in range(n):
            mean = float(cosines[j, group].mean().clamp(-1, 1)) if group else -inf
            same = segments is None or bool(segments[p, j] == segments[p, j - 1])
            if group and mean >= threshold and same:
                scores[p, j] = (len(group) * mean + 1) / (len(group) + 1)
                group.append(j)
            else:
                group = [j]
    return scores


def _torch(features: Tensor, counts: Tensor, threshold: float, segments: Tensor | None = None) -> Tensor:
    """All clips at once; the sum of a group's unit vectors stands for its members, so that a token costs O(D)."""
    x = unit(features)
    scores = torch.full(x.shape[:2], inf, dtype=x.dtype, device=x.device)
    if not x.shape[1]:
        return scores
    valid = before(counts, x.shape[1])
    total, size = x[:, 0].clone(), torch.ones(len(x), dtype=x.dtype, device=x.device)
    for j in range(1, x.shape[1]):
        mean = ((x[:, j] * total).sum(1) / size).clamp(-1, 1)
        joins = valid[:, j] & (mean >= threshold)
        if segments is not None:
            joins = joins & (segments[:, j] == segments[:, j - 1])
        scores[:, j] = torch.where(joins, (size * mean + 1) / (size + 1), inf)
        total = torch.where(joins[:, None], total + x[:, j], x[:, j])
        size = torch.where(joins, size + 1, 1)
    return scores


def _triton(features: Tensor, counts: Tensor, threshold: float, segments: Tensor | None = None) -> Tensor:
    from .kernels.triton.samp import groups

    return groups(features, inverse(norms(features)), counts, threshold, segments)


def _fits(features: Tensor, *_: object, **__: object) -> tuple[bool, str]:
    if features.dtype == torch.float64 or features.shape[2] > MOST_WIDTH or features.stride(2) != 1:
        return False, f"no FP64, a token's values beside each other, and no more than {MOST_WIDTH} of them"
    return on_gpu(features)


SAMP_GROUPS = Kernel(
    "mmprune.samp_groups",
    reference,
    (Implementation("torch", _torch, on_cpu), Implementation("triton", _triton, _fits, triton_runs), Implementation("steps", _torch)),
)
SAMP_MERGE = Kernel(
    "mmprune.samp_merge",
    merge,
    (Implementation("torch", merge, on_cpu), Implementation("triton", _merge_triton, _fits, triton_runs), Implementation("steps", merge)),
)
