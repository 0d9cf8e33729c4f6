"""What keys receive of attention, and the logarithm of each row's sum, without N x N weights in memory.

Shapes: q [B, H, T, d], k [B, G, N, d] with H a multiple of G; the T queries are the last of the N places. A span [B, 2], integers, holds the first place
of a row and the one behind its last; all others are padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

# queries whose weights are in memory at a time, of all rows of a batch together
BLOCK = 512


def within(span: Tensor, first: int, count: int) -> Tensor:
    """[B, count], bool: which of the places from `first` lie in a row's span."""
    place = torch.arange(first, first + count, device=span.device)
    return (place >= span[:, :1]) & (place < span[:, 1:])


def _scores(q: Tensor, k: Tensor, scale: float, span: Tensor | None, causal: bool, first: int) -> Tensor:
    """[B, H, R, N], fp32, of queries of which the first stands at place `first`; -inf for keys that are not seen."""
    batch, heads, rows, width = q.shape
    # heads that share keys become more queries of one head, so that no key is repeated
    shared = q.float().reshape(batch, k.shape[1], -1, width)
    scores = (shared @ k.float().transpose(2, 3)).view(batch, heads, rows, -1).mul_(scale)
    if causal:
        place = torch.arange(k.shape[2], device=q.device)
        scores.masked_fill_(place > place[first : first + rows, None], -torch.inf)
    if span is not None:
        scores.masked_fill_(~within(span, 0, k.shape[2])[:, None, None], -torch.inf)
    return scores


def lse_reference(q: Tensor, k: Tensor, scale: float, span: Tensor | None = None, causal: bool = False) -> Tensor:
    """[B, H, T], fp32: log(sum of exp(q.k scale)) over the keys that a query sees; -inf where it sees none.

    Args:
        span: of the keys; None: there is no padding.
        causal: whether a query sees no later place than its own.
    """
    return _scores(q, k, scale, span, causal, k.shape[2] - q.shape[2]).logsumexp(-1)


def received_reference(
    q: Tensor, k: Tensor, scale: float, span: Tensor | None = None, asking: Tensor | None = None, causal: bool = False, highest: bool = False
) -> Tensor:  # fmt: skip
    """[B, N], fp32: for each key the sum over queries of the weight that they give it, the mean of the heads' or the highest.

    Args:
        span, causal: as for `lse_reference`.
        asking: which queries count, as a span; None: those within `span`.
        highest: take of a query's heads the highest weight in place of the mean.
    """
    asking = span if asking is None else asking
    first = k.shape[2] - q.shape[2]
    weights = _scores(q, k, scale, span, causal, first).softmax(-1)
    weights = weights.amax(1) if highest else weights.mean(1)
    if asking is not None:
        weights = torch.where(within(asking, first, q.shape[2])[..., None], weights, 0.0)
    return weights.sum(1)


def _blocks(q: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    """Some queries of every row of the batch, and the number of the first."""
    rows = max(1, block // q.shape[0])
    for start in range(0, q.shape[2], rows):
        yield start, q[:, :, start : start + rows]


def lse_blocked(q: Tensor, k: Tensor, scale: float, span: Tensor | None = None, causal: bool = False, block: int = BLOCK) -> Tensor:
    """As the reference, with the weights of `block` queries in memory."""
    first, k = k.shape[2] - q.shape[2], k.float()
    return torch.cat([_scores(part, k, scale, span, causal, first + start).logsumexp(-1) for start, part in _blocks(q, block)], -1)


def received_blocked(
    q: Tensor, k: Tensor, scale: float, span: Tensor | None = None, asking: Tensor | None = None, causal: bool = False, highest: bool = False,
    block: int = BLOCK,
) -> Tensor:  # fmt: skip
    """As the reference, with the weights of `block` queries in memory."""
    asking = span if asking is None else asking
    first, k = k.shape[2] - q.shape[2], k.float()
    sums = torch.zeros(k.shape[0], k.shape[2], device=k.device)
    for start, part in _blocks(q, block):
        weights = _scores(part, k, scale, span, causal, first + start).softmax(-1)
        weights = weights.amax(1) if highest else weights.mean(1)
        if asking is not None:  # not by multiplying: what a padded query sees of nothing is NaN
            weights = torch.where(within(asking, first + start, part.shape[2])[..., None], weights, 0.0)
        sums += weights.sum(1)
    return sums


def _lse_triton(q: Tensor, k: Tensor, scale: float, span: Tensor | None = None, causal: bool = False) -> Tensor:
    from .triton.received import lse

    return lse(q, k, scale, span, causal)


def _received_triton(
    q: Tensor, k: Tensor, scale: float, span: Tensor | None = None, asking: Tensor | None = None, causal: bool = False, highest: bool = False
) -> Tensor:  # fmt: skip
    from .triton.received import received

    return received(q, k, scale, span, asking, causal, highest)


def _on_cpu(q: Tensor, *_: object, **__: object) -> tuple[bool, str]:
    return q.device.type == "cpu", "tensors on the CPU"


def _fits(q: Tensor, k: Tensor, *_: object, **__: object) -> tuple[bool, str]:
    import triton

    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return False, "no gradients"
    if q.shape[3] > 256 or q.dtype != k.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, "queries and keys of one dtype, heads up to 256 wide"
    return q.is_cuda or bool(triton.knobs.runtime.interpret), "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"


LSE = Kernel(
    "mmprune.lse",
    lse_reference,
    (
        Implementation("torch", lse_blocked, _on_cpu),
        Implementation("triton", _lse_triton, _fits, triton_runs),
        Implementation("blocked", lse_blocked),
    ),
)
RECEIVED = Kernel(
    "mmprune.received",
    received_reference,
    (
        Implementation("torch", received_blocked, _on_cpu),
        Implementation("triton", _received_triton, _fits, triton_runs),
        Implementation("blocked", received_blocked),
    ),
)
