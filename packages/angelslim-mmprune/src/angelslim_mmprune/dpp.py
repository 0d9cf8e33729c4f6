"""Tokens that are relevant and unlike each other: greedy MAP of a determinantal point process.

Shapes: B clips, N tokens of the longest, D width, K picks of the clip that has most.

The kernel is diag(r) C diag(r) with C the cosines of the tokens, and each pick is the token that multiplies the determinant of the
picked ones' kernel by most. That factor is r_j^2 v_j, where v_j is what the picked ones leave of token j's unit vector: 1 minus the
squares of its row in the Cholesky factor of C. So r scales scores only and never rounds what is factored.

Source: arXiv:1709.05135 (Chen et al.) algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from angelslim_core.errors import UsageError
from angelslim_core.kernels import Implementation, Kernel, triton_runs

from .finite import all_finite, norms, require
from .plan import before, of_host

# of a token's unit vector: where picks leave no more, FP32 holds nothing but rounding of it, and relevance alone decides
NOTHING = 1e-6
# relevance relative to a clip's highest: tokens of none are still told apart by how unlike they are
LEAST_RELEVANCE = 1e-8
# tokens that a program holds in registers
MOST_TOKENS = 8192


def dpp(features: Tensor, relevance: Tensor, keep: Sequence[int], counts: Sequence[int] | None = None, *, executor: str = "auto") -> Tensor:
    """Choose tokens of each clip.

    Args:
        features: [B, N, D]; what stands behind a clip's tokens is not read.
        relevance: [B, N], not negative; only ratios within a clip matter.
        keep: of each clip, how many.
        counts: tokens of each clip; None: N.

    Returns:
        int64 [B, K], ascending, -1 behind a clip's last. Where no token is left that differs from the picked ones, the most relevant
        follow. Ties go to the lower index.

    Raises:
        UsageError: shapes that do not fit, or more to keep than there are.
        NotFiniteError: features or relevance are NaN or infinite.
    """
    counts = [features.shape[1]] * len(features) if counts is None else counts
    fits = features.dim() == 3 and relevance.shape == features.shape[:2] and len(keep) == len(counts) == len(features)
    if not fits or any(not 0 <= k <= n <= features.shape[1] for k, n in zip(keep, counts, strict=True)):
        shapes = f"keep {[*keep]} of {[*counts]} tokens of features {[*features.shape]} and relevance {[*relevance.shape]}"
        raise UsageError(841, "dpp", shapes, "features [B, N, D], relevance [B, N], and 0 to as many tokens of each clip as it has")
    on_device = of_host(counts, features.device)
    finite = all_finite(before(on_device, features.shape[1]), features, relevance)
    picks = DPP(features, relevance, of_host(keep, features.device), on_device, max(keep, default=0), executor=executor)
    require(finite, 842, "dpp")
    return ascending(picks, features.shape[1])


def ascending(picks: Tensor, tokens: int) -> Tensor:
    """Numbers below `tokens` sorted along the last dimension, with -1 behind them."""
    found = picks.masked_fill(picks < 0, tokens).sort(-1).values
    return found.masked_fill(found == tokens, -1)


def inverse(lengths: Tensor) -> Tensor:
    """What scales tokens of these lengths to 1; 0 of those that are 0."""
    return torch.where(lengths > 0, 1 / lengths, 0)


def told_apart(cosines: Tensor) -> Tensor:
    """Cosines to 2**-20, which is more than rounding moves them: copies of a token are equally like their neighbours, and are ties."""
    return (cosines * 2**20).round()


def unit(features: Tensor) -> Tensor:
    """Tokens of length 1, in FP32, or FP64 as they are."""
    length = norms(features)
    return features.to(length.dtype) * inverse(length)[..., None]


def prepare(features: Tensor, relevance: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Before the first pick, each [B, N]: what scales tokens to length 1, relevance by its highest, and v: -1 of what is no token."""
    length = norms(features)
    valid = before(counts, features.shape[1])
    r = relevance.to(length.dtype).masked_fill(~valid, 0)
    highest = r.amax(1, keepdim=True)
    r = torch.where(highest > 0, r / highest, 0).clamp(min=LEAST_RELEVANCE)
    return inverse(length), r, torch.where(valid, (length > 0).to(length.dtype), -1)


def reference(features: Tensor, relevance: Tensor, keep: Tensor, counts: Tensor, most: int) -> Tensor:
    """A clip after the other, with the whole factor.

    Args:
        keep, counts: int64 [B], on the device of the features.
        most: the largest of keep, or more.

    Returns:
        int64 [B, most]: picks in their order, -1 behind.
    """
    picks = torch.full((len(features), most), -1, device=features.device)
    if not most:
        return picks
    _, relevances, residuals = prepare(features, relevance, counts)
    for b, (k, n) in enumerate(zip(keep.tolist(), counts.tolist(), strict=True)):
        x = unit(features[b, :n])
        r, v = relevances[b, :n], residuals[b, :n].clone()
        factor = x.new_zeros(k, n)
        free = torch.ones(n, dtype=torch.bool, device=x.device)
        for t in range(k):
            differs = free & (v > NOTHING)
            if differs.any():
                j = int((r * r * v).masked_fill(~differs, -1).argmax())
                factor[t] = (x @ x[j] - factor[:t].T @ factor[:t, j]) / v[j].sqrt()
                v = v - factor[t] ** 2
            else:
                j = int(r.masked_fill(~free, -1).argmax())
            free[j] = False
            picks[b, t] = j
    return picks


def _torch(features: Tensor, relevance: Tensor, keep: Tensor, counts: Tensor, most: int) -> Tensor:
    """As the reference, all clips at once and without a wait for the device."""
    picks = torch.full((len(features), most), -1, device=features.device)
    if features.device.type == "cpu":  # nothing to wait for: clips that need no pick cost none
        most = int(keep.max()) if len(keep) else 0
    if not most:
        return picks
    _, r, v = prepare(features, relevance, counts)
    x = unit(features)
    gram = x @ x.mT
    factor = gram.new_zeros(len(x), most, x.shape[1])
    for t in range(most):
        score = torch.where(v > NOTHING, r * r * v, -1)
        top, j = score.max(1, keepdim=True)
        differs = top > 0
        j = torch.where(differs, score.argmax(1, keepdim=True), r.masked_fill(v < 0, -1).argmax(1, keepdim=True))
        row, column = (j[..., None].expand(-1, *shape) for shape in ((1, x.shape[1]), (t, 1)))
        rest = gram.gather(1, row) - (factor[:, :t].gather(2, column).mT @ factor[:, :t])
        factor[:, t : t + 1] = torch.where(differs[..., None], rest * v.gather(1, j).clamp(min=NOTHING).rsqrt()[..., None], 0)
        v = torch.where(v < 0, v, (v - factor[:, t] ** 2).clamp(min=0)).scatter(1, j, -1)
        picks[:, t : t + 1] = torch.where(t < keep[:, None], j, -1)
    return picks


def _triton(features: Tensor, relevance: Tensor, keep: Tensor, counts: Tensor, most: int) -> Tensor:
    from .kernels.triton.dpp import dpp as on_device

    return on_device(features, relevance, keep, counts, most)


def on_cpu(features: Tensor, *_: object, **__: object) -> tuple[bool, str]:
    """Where the torch forms are the fast ones."""
    return features.device.type == "cpu", "tensors on the CPU"


def on_gpu(features: Tensor, *_: object, **__: object) -> tuple[bool, str]:
    """Where Triton's run: on the CPU in its interpreter."""
    import triton

    return features.is_cuda or bool(triton.knobs.runtime.interpret), "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"


def _fits(features: Tensor, *_: object, **__: object) -> tuple[bool, str]:
    if features.dtype == torch.float64 or features.shape[1] > MOST_TOKENS:
        return False, f"no FP64, and no more than {MOST_TOKENS} tokens"
    return on_gpu(features)


DPP = Kernel(
    "mmprune.dpp", reference, (Implementation("torch", _torch, on_cpu), Implementation("triton", _triton, _fits, triton_runs), Implementation("steps", _torch))
)
