"""Greedy picks by a rule: what each pick takes from the scores of the others.

Shapes: P pools, N tokens of the largest, K picks of the one that picks most, D width. `counts` and `ks` are known to the host, and nothing
here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..picking import Cosines, unit
from ..plan import before, of_host
from .mmr import GRAM_BYTES

# apart: DivPrune's, the furthest from those picked, by 1 - cos, of which the first is the furthest from its nearest; damped: ID-Selection's, a pick of
# score s takes exp(-strength (1 - cos)^2) s from each other, and those that have none left follow by weight; covering, covering_or: SCOPE's, what a
# token adds to the sum over all of their largest cosines to picked ones, 0 at least, times its weight, or plus it
Rule = Literal["apart", "damped", "covering", "covering_or"]
# tokens of which a program's registers hold what a rule keeps of them
MOST = {"apart": 16384, "damped": 16384, "covering": 8192, "covering_or": 8192}
# of cosines: sums of such numbers are exact in any order, so that what is added to and taken from them leaves no rounding
GRID = 2**24


def reference(features: Tensor, weight: Tensor, counts: Sequence[int], ks: Sequence[int], rule: Rule, strength: float = 0.0) -> Tensor:
    """One pool and one pick after the other, in FP64.

    Args:
        features: [P, N, D]; what stands behind a pool's count is not read, here and below.
        weight: [P, N], fp32, 0 or more; `damped` takes them to be 0..1, `apart` does not read them.
        strength: of `damped`.

    Returns:
        [P, K], int64: tokens as they were picked, of equal scores the first; -1 behind the last of a pool.
    """
    order = torch.full((len(counts), max(ks, default=0)), -1, device=features.device)
    for p, (count, k) in enumerate(zip(counts, ks, strict=True)):
        x = torch.nn.functional.normalize(features[p, :count].double(), dim=-1)
        w = weight[p, :count].double()
        cosine = x @ x.T
        cosine = torch.where((cosine - 1).abs() < 2e-6, 1.0, (cosine * GRID).round() / GRID)
        others = cosine.masked_fill(torch.eye(count, dtype=torch.bool, device=x.device), -1)
        left, free = w.clone(), torch.ones_like(w, dtype=torch.bool)
        for t in range(k):
            picked = order[p, :t]
            if rule == "apart":
                score = -(cosine[picked] if t else others).amax(0)
            elif rule == "damped":
                score = torch.where(left > 0, left, w - 1)
            else:
                covered = cosine[picked].amax(0).clamp(min=0) if t else torch.zeros_like(w)
                gain = (cosine - covered).clamp(min=0).sum(1)
                score = gain * w if rule == "covering" else gain + w
            best = score.masked_fill(~free, -torch.inf).argmax()
            order[p, t], free[best] = best, False
            left = (left - torch.exp(-strength * (1 - cosine[best]).clamp(min=0) ** 2) * left[best]).clamp(min=0)
    return order


def batched(features: Tensor, weight: Tensor, counts: Sequence[int], ks: Sequence[int], rule: Rule, strength: float = 0.0) -> Tensor:
    """As the reference: all pools at a time, in FP32, a few operations a pick."""
    valid = before(of_host(counts, features.device), features.shape[1])
    start: Callable[..., tuple[Tensor, Callable[[Tensor], Tensor]]] = {"apart": _apart, "damped": _damped}.get(rule, _covering)
    return _one_by_one(valid, ks, *start(unit(features, valid), weight.masked_fill(~valid, 0), valid, rule, strength))


def _one_by_one(valid: Tensor, ks: Sequence[int], scores: Tensor, after: Callable[[Tensor], Tensor]) -> Tensor:
    """Picks of the largest score, of equal ones the first, in their order.

    Args:
        scores: [P, N], of the first pick.
        after: the scores of the next, given the pick [P] of each pool; that of a pool that has enough already counts for nothing.
    """
    free, most = valid.clone(), max(ks, default=0)
    pools = torch.arange(len(valid), device=valid.device)
    order = torch.empty(most, len(valid), dtype=torch.int64, device=valid.device)
    for step in range(most):
        picked = torch.argmax(scores.masked_fill(~free, -torch.inf), 1, out=order[step])
        free[pools, picked] = False
        if step < most - 1:
            scores = after(picked)
    return torch.where(before(of_host(ks, valid.device), most), order.T, -1)


def _apart(rows: Tensor, weight: Tensor, valid: Tensor, rule: Rule, strength: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    cosines = Cosines(rows)
    closest = torch.full_like(weight, -1)  # cosine to the nearest pick

    def after(token: Tensor) -> Tensor:
        torch.maximum(closest, cosines.of(token), out=closest)
        return -closest

    return -cosines.nearest(valid), after


def _damped(rows: Tensor, weight: Tensor, valid: Tensor, rule: Rule, strength: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    cosines = Cosines(rows)
    left = weight.clone()
    pools = torch.arange(len(left), device=left.device)

    def after(token: Tensor) -> Tensor:
        damping = torch.exp(-strength * (1 - cosines.of(token)).clamp(min=0) ** 2)
        left.sub_(damping * left[pools, token][:, None]).clamp_(min=0)
        return torch.where(left > 0, left, weight - 1)

    return weight, after


def _covering(rows: Tensor, weight: Tensor, valid: Tensor, rule: Rule, strength: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    cosines = rows @ rows.mT  # symmetric; 0 to what is no token, which so covers nothing and is covered by nothing
    uncovered = torch.empty_like(cosines)
    covered = torch.zeros_like(weight)
    pools = torch.arange(len(rows), device=rows.device)

    def scores() -> Tensor:
        gain = torch.sub(cosines, covered[:, None], out=uncovered).clamp_(min=0).sum(-1)
        return gain * weight if rule == "covering" else gain + weight

    def after(token: Tensor) -> Tensor:
        torch.maximum(covered, cosines[pools, token], out=covered)
        return scores()

    return scores(), after


def _triton(features: Tensor, weight: Tensor, counts: Sequence[int], ks: Sequence[int], rule: Rule, strength: float = 0.0) -> Tensor:
    from .triton.greedy import picks

    return picks(features, weight, counts, ks, rule, strength)


def on_cpu(features: Tensor, *_: object) -> tuple[bool, str]:
    """Where the torch forms are the fast ones."""
    return features.device.type == "cpu", "tensors on the CPU"


def _fits(features: Tensor, weight: Tensor, counts: Sequence[int], ks: Sequence[int], rule: Rule, *_: object) -> tuple[bool, str]:
    import triton

    tokens = features.shape[1]
    if features.dtype == torch.float64 or tokens > MOST[rule] or 4 * tokens * (tokens + 15) > GRAM_BYTES:
        return False, f"no FP64, and no more than {MOST[rule]} tokens"
    return features.is_cuda or bool(triton.knobs.runtime.interpret), "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"


GREEDY = Kernel(
    "mmprune.greedy",
    reference,
    (Implementation("torch", batched, on_cpu), Implementation("triton", _triton, _fits, triton_runs), Implementation("steps", batched)),
)
