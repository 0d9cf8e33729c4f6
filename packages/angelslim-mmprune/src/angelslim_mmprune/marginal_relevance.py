"""Maximal marginal relevance: tokens that matter and do not repeat each other.

Shapes: B samples, N tokens, K picks, D width.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .finite import require
from .kernels.mmr import MMR, Picks
from .plan import before, of_host


def mmr(
    features: Tensor, importance: Tensor, k: int | Sequence[int], lam: float = 0.5, parallel_k: int = 1,
    *, counts: Sequence[int] | None = None, executor: str = "auto", check: bool = True,
) -> Tensor:  # fmt: skip
    """Choose tokens one by one: of the highest lam * importance - (1 - lam) * max cosine to those chosen before.

    Args:
        features: [B, N, D], any floating dtype; computed with in fp32, or for a GPU's Triton in products that are as good to 1e-4.
        importance: [B, N]; it is scaled to (w - min) / (max - min + 1e-6) over a sample's tokens. The first pick is the highest, whatever `lam`.
        k: tokens to choose, of all samples or of each.
        lam: 1: by importance alone; 0: by distance alone, after the first.
        parallel_k: picks that are made by the same scores, which is faster and chooses tokens that are more alike.
        counts: tokens of each sample, where some are padded; what stands behind is not read.
        check: look for NaN, once the work is under way; only with it does the host wait for the device.

    Returns:
        [B, K], int64: ascending token numbers; -1 behind the last where k differs. Of equal scores the lowest number is chosen.

    Raises:
        UsageError: shapes that do not fit, k outside of 1..N, lam outside of 0..1.
        NotFiniteError: NaN or Inf among the tokens, or numbers so large that their squares are; both are also `ValueError`s.

    Source: arXiv:2602.13315 §3.
    """
    order = mmr_order(features, importance, k, lam, parallel_k, counts=counts, executor=executor, check=check)
    behind = features.shape[1]
    found = torch.where(order < 0, behind, order).sort(dim=1).values
    return torch.where(found == behind, -1, found)


def mmr_order(
    features: Tensor, importance: Tensor, k: int | Sequence[int], lam: float = 0.5, parallel_k: int = 1,
    *, counts: Sequence[int] | None = None, executor: str = "auto", check: bool = True,
) -> Tensor:  # fmt: skip
    """As `mmr`, but [B, K] in the order of the picks. Where all tokens are asked for that is their own order, as nothing is computed."""
    sizes, ks = _sizes(features, importance, k, counts)
    if not 0 <= lam <= 1:
        raise UsageError(832, "lam", f"{lam!r:.50} is outside of 0..1")
    if isinstance(parallel_k, bool) or not isinstance(parallel_k, int) or parallel_k < 1:
        raise UsageError(833, "parallel_k", f"{parallel_k!r:.50} is no number of picks", "give 1 or more")
    picks = _all_of(features, importance, sizes) if ks == sizes else None
    if picks is None:
        picks = MMR(features, scaled(importance.float(), sizes), sizes, ks, float(lam), parallel_k, executor=executor)
    if check:
        require(picks.finite, 834, "mmr")
    return picks.order


def scaled(importance: Tensor, counts: Sequence[int]) -> Tensor:
    """fp32 [B, N] as (w - min) / (max - min + 1e-6) over the tokens of each sample; 0 behind them."""
    valid = _valid(importance, counts)
    low = torch.where(valid, importance, torch.inf).amin(1, keepdim=True)
    high = torch.where(valid, importance, -torch.inf).amax(1, keepdim=True)
    return torch.where(valid, (importance - low) / (high - low + 1e-6), 0)


def _valid(importance: Tensor, counts: Sequence[int]) -> Tensor:
    return before(of_host(counts, importance.device), importance.shape[1])


def _all_of(features: Tensor, importance: Tensor, counts: Sequence[int]) -> Picks:
    valid = _valid(importance, counts)
    finite = (features.isfinite().all(-1) & importance.isfinite() | ~valid).all()
    token = torch.arange(max(counts), device=features.device)
    return Picks(torch.where(valid[:, : max(counts)], token, -1), finite)


def _sizes(features: Tensor, importance: Tensor, k: int | Sequence[int], counts: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens and picks of each sample."""
    if features.dim() != 3 or not features.is_floating_point() or 0 in features.shape:
        raise UsageError(830, "features", f"{features.dtype} {list(features.shape)} are no features", "give floating-point numbers [B, N, D], none of them 0")
    batch, tokens, _ = features.shape
    if importance.shape != (batch, tokens) or importance.device != features.device:
        what = f"{list(importance.shape)} on {importance.device} do not fit features {list(features.shape)} on {features.device}"
        raise UsageError(831, "importance", what, "give a number a token, where the features are")
    sizes = (tokens,) * batch if counts is None else tuple(map(operator.index, counts))
    ks = tuple(map(operator.index, k)) if isinstance(k, Sequence) else (operator.index(k),) * batch
    if len(sizes) != batch or not all(0 < n <= tokens for n in sizes):
        raise UsageError(835, "counts", f"{list(sizes)!r:.100} are no numbers of tokens of {batch} samples of up to {tokens}")
    if len(ks) != batch or not all(0 < n <= size for n, size in zip(ks, sizes, strict=True)):
        raise UsageError(836, "k", f"{list(ks)!r:.100} of {list(sizes)!r:.100} tokens", "ask for at least one, and for no more than there are")
    return sizes, ks
