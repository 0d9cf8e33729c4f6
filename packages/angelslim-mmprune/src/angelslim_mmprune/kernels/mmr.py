"""Greedy maximal marginal relevance: the order in which tokens are picked.

Shapes: B samples, N tokens of the longest, K picks of the one that picks most, D width. `counts` and `ks` are known to the host,
and nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..plan import of_host

# tokens up to which all cosines are computed at once, and bytes that they may take; samples that need more take turns
GRAM_TOKENS, GRAM_BYTES = 4096, 2 << 30


class Picks(NamedTuple):
    """
    Args:
        order: [B, K], int64: tokens as they were picked, -1 behind the last of a sample.
        finite: [], bool: whether features and importance were.
    """

    order: Tensor
    finite: Tensor


def reference(features: Tensor, importance: Tensor, counts: Sequence[int], ks: Sequence[int], lam: float, parallel_k: int) -> Picks:
    """One sample and one pick after the other: the token of highest lam * importance - (1 - lam) * max cosine to those picked; ties: the lowest.

    Args:
        features: [B, N, D]; what stands behind a sample's count is not read, here and below.
        importance: [B, N], fp32, in [0, 1]; the first pick goes by it alone.
        parallel_k: picks that are made by the same scores.

    Source: arXiv:2602.13315 §3.
    """
    order = torch.full((len(counts), max(ks)), -1, device=features.device)
    finite = torch.ones((), dtype=torch.bool, device=features.device)
    for b, (count, k) in enumerate(zip(counts, ks, strict=True)):
        x, weight = features[b, :count].float(), importance[b, :count]
        finite &= x.isfinite().all() & weight.isfinite().all()
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
        nearest = torch.full_like(weight, -1)
        score = weight.clone()
        for t in range(k):
            if t and t % parallel_k == 0:
                score = (lam * weight - (1 - lam) * nearest).index_fill(0, order[b, :t], -torch.inf)
            best = score.argmax()
            order[b, t] = best
            score[best] = -torch.inf
            cosine = (x * x[best]).sum(-1)
            # rounding must not make one token's copies differ from another's
            nearest = nearest.maximum(torch.where((x == x[best]).all(-1) & (cosine > 0.999), 1.0, cosine))
    return Picks(order, finite)


def batched(features: Tensor, importance: Tensor, counts: Sequence[int], ks: Sequence[int], lam: float, parallel_k: int) -> Picks:
    """As the reference: all samples at a time, by all cosines up to `GRAM_TOKENS`, above that by those of each pick."""
    tokens = features.shape[1]
    gram = tokens <= GRAM_TOKENS
    together = max(1, GRAM_BYTES // (4 * tokens * (tokens if gram else features.shape[2])))
    parts = [
        _together(features[b : b + together], importance[b : b + together], counts[b : b + together], ks[b : b + together], lam, parallel_k, gram)
        for b in range(0, len(counts), together)
    ]
    return Picks(stacked([part.order for part in parts], max(ks)), torch.stack([part.finite for part in parts]).all())


def _together(features: Tensor, importance: Tensor, counts: Sequence[int], ks: Sequence[int], lam: float, parallel_k: int, gram: bool) -> Picks:
    batch, tokens, _ = features.shape
    free = torch.arange(tokens, device=features.device) < of_host(counts, features.device)[:, None]
    picks = of_host(ks, features.device)
    x = torch.where(free[..., None], features.float(), 0)
    weight = torch.where(free, importance, 0)
    norm = x.norm(dim=-1, keepdim=True)
    finite = norm.isfinite().all() & weight.isfinite().all()
    x = x / (norm + 1e-8)
    twin = _first_copies(x)
    # exactly 1, so that rounding does not make one token's copies differ from another's
    own = (x * x).sum(-1)
    own = own.masked_fill(own > 0.999, 1.0)
    products = x @ x.mT if gram else None
    if products is not None:
        products.diagonal(dim1=1, dim2=2).copy_(own)
    row = torch.arange(batch, device=features.device)
    order = torch.empty(max(ks), batch, dtype=torch.int64, device=features.device)
    nearest = torch.full_like(weight, -1)
    gone, share = ~free, lam * weight
    score = weight
    for t in range(max(ks)):
        if t and t % parallel_k == 0:
            score = torch.sub(share, nearest, alpha=1 - lam)
        best = torch.argmax(score.masked_fill(gone, -torch.inf), 1, out=order[t])
        gone[row, best] = True
        first = twin[row, best]
        if products is not None:
            cosine = products[row, first]
        else:
            cosine = (x @ x[row, first][..., None])[..., 0]
            cosine[row, first] = own[row, first]
        torch.maximum(nearest, cosine.gather(1, twin), out=nearest)
    turn = torch.arange(max(ks), device=features.device)
    return Picks(torch.where(turn < picks[:, None], order.T, -1), finite)


def _first_copies(x: Tensor) -> Tensor:
    """[B, N], int64: the first token that equals each of [B, N, D]. A matrix product may round equal rows apart, by where they stand."""
    generator = torch.Generator().manual_seed(0)
    sums = [(x * torch.randn(x.shape[-1], generator=generator).to(x.device, non_blocking=True)).sum(-1) for _ in range(2)]
    high, low = (s.contiguous().view(torch.int32).long() for s in sums)
    key, token = ((high << 32) | (low & 0xFFFFFFFF)).sort(dim=1, stable=True)
    place = torch.arange(x.shape[1], device=x.device)
    is_new = torch.nn.functional.pad(key[:, 1:] != key[:, :-1], (1, 0), value=True)
    start = torch.where(is_new, place, 0).cummax(1).values
    return torch.empty_like(token).scatter_(1, token, token.gather(1, start))


def stacked(orders: Sequence[Tensor], most: int) -> Tensor:
    """Orders [b, k] one below the other: [B, most], -1 behind."""
    return torch.cat([torch.nn.functional.pad(order, (0, most - order.shape[1]), value=-1) for order in orders])


def _triton(features: Tensor, importance: Tensor, counts: Sequence[int], ks: Sequence[int], lam: float, parallel_k: int) -> Picks:
    from .triton.mmr import picks

    return picks(features, importance, counts, ks, lam, parallel_k)


def _has_no_faster(features: Tensor, *_: object) -> tuple[bool, str]:
    return not features.is_cuda or not triton_runs()[0], "tensors on the CPU, or no Triton"


def _on_gpu(features: Tensor, *_: object) -> tuple[bool, str]:
    import triton

    return features.is_cuda or bool(triton.knobs.runtime.interpret), "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"


MMR = Kernel("mmprune.mmr", reference, (Implementation("torch", batched, _has_no_faster), Implementation("triton", _triton, _on_gpu, triton_runs)))
