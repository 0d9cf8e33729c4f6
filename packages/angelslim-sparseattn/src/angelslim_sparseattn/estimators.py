"""How much each block of keys matters to each block of queries, found without computing attention.

Shapes: Hq query and Hkv KV heads, L queries, N keys, Pq and Pk blocks of b, strides of s tokens (s divides b), R = b / s.
All results are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .prefill import Prefill

# groups of queries that are scored at a time: bounds the memory of antidiagonal scores
_GROUPS = 2048


def products(q: Tensor, k: Tensor) -> Tensor:
    """[Hq, A, E] of q [Hq, A, D] and k [Hkv, E, D]; a KV head is read once for each of its query heads, never repeated."""
    q = q.unflatten(0, (k.shape[0], -1))
    return torch.stack([q[:, g] @ k.mT for g in range(q.shape[1])], 1).flatten(0, 1)


def means(x: Tensor, block: int) -> Tensor:
    """Mean [H, P, D] of each block of x [H, T, D], the last one's over the tokens it has."""
    sums = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block)).sum(2)
    return sums / _sizes(x.shape[1], block, x.device)[:, None]


def _sizes(length: int, block: int, device: torch.device) -> Tensor:
    """Tokens of each block."""
    return (length - torch.arange(0, length, block, device=device)).clamp(max=block)


def strided(x: Tensor, block: int, stride: int, reverse: bool) -> Tensor:
    """[H, P, R, s * D]: the tokens of each stride side by side, those of queries in reverse; zeros after the last."""
    if block % stride:
        raise UsageError(532, "stride", f"{stride} does not divide the block of {block}")
    parts = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block // stride, stride))
    return (parts.flip(3) if reverse else parts).flatten(3)


def antidiagonal_mean(s: Prefill, stride: int) -> Tensor:
    """[Hq, Pq, Pk]: mean over a block's R x R cells of X[a, e] = c / s * sum over t < s of q[a s + s - 1 - t] . k[e s + t].

    The mean is linear, so that queries and keys are summed first: one product of Pq x (s D) x Pk. Of blocks that end early it
    is the mean over the tokens there are.
    """
    q, k = (strided(x, s.block, stride, reverse).sum(2) for x, reverse in ((s.q, True), (s.k, False)))
    rows, columns = (_sizes(n, s.block, s.q.device) for n in (s.q_len, s.kv_len))
    return products(q, k) * (s.scale * stride / (rows[:, None] * columns))


def antidiagonal_cells(s: Prefill, stride: int) -> Iterator[tuple[int, slice, Tensor]]:
    """X of `antidiagonal_mean` cell by cell: (head, its query blocks, [blocks, R, Pk, R]); -inf where a key is later than
    all queries of the cell, and where there is no key. Rows without queries are 0 up to there."""
    q, k = strided(s.q, s.block, stride, True), strided(s.k, s.block, stride, False).flatten(1, 2)
    parts = s.block // stride
    e = torch.arange(k.shape[1], device=k.device) * stride
    blocks = max(1, _GROUPS // parts)
    for head in range(len(q)):
        for start in range(0, s.rows, blocks):
            piece = slice(start, min(start + blocks, s.rows))
            groups = q[head, piece].flatten(0, 1)
            last = s.off + start * s.block + torch.arange(1, len(groups) + 1, device=k.device) * stride - 1
            x = (groups @ k[head // s.groups].T) * (s.scale / stride)
            x = x.masked_fill((e > last[:, None]) | (e >= s.kv_len), -torch.inf)
            yield head, piece, x.view(-1, parts, s.columns, parts)


def real_groups(s: Prefill, stride: int, blocks: slice) -> Tensor:
    """Which groups [blocks, R] of `stride` queries have any query."""
    start = torch.arange(0, s.rows * s.block, stride, device=s.q.device).view(s.rows, -1)
    return start[blocks] < s.q_len


def last_attention(s: Prefill, queries: int) -> Tensor:
    """Attention [Hq, r, N] of the last r = min(queries, L) queries, exact and causal."""
    queries = min(queries, s.q_len)
    scores = products(s.q[:, -queries:].float(), s.k.float()) * s.scale
    position = torch.arange(s.kv_len - queries, s.kv_len, device=scores.device)
    later = torch.arange(s.kv_len, device=scores.device) > position[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def diagonal_sums(attention: Tensor) -> Tensor:
    """[H, N]: attention [H, r, N] of the last r queries summed over keys as far from their query as the place in the result."""
    queries, keys = attention.shape[1:]
    sums = attention.new_zeros(len(attention), keys)
    for row in range(queries):
        length = keys - queries + row + 1
        sums[:, :length] += attention[:, row, :length].flip(-1)
    return sums


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sums [..., P] over the blocks of x [..., N]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def pooled(s: Prefill) -> Tensor:
    """Scores [Hq, Pq, Pk] of mean queries and mean keys."""
    return products(means(s.q, s.block), means(s.k, s.block)) * s.scale


def mean_key_mass(s: Prefill) -> Tensor:
    """[Hq, Pq, Pk]: sum over a block's queries of exp(score of the mean key - the highest such score of the query block).

    Only blocks that end no later than the query count. The mean key is rounded to the keys' dtype.
    Source: FlashPrefill.
    """
    keys = means(s.k, s.block).to(s.k.dtype).float()
    scores = products(s.q.float(), keys) * s.scale
    position = s.off + torch.arange(s.q_len, device=scores.device)
    scores = scores.masked_fill(((s.j + 1) * s.block - 1).clamp(max=s.kv_len - 1) > position[:, None], -torch.inf)
    scores = torch.nn.functional.pad(scores, (0, 0, 0, -s.q_len % s.block), value=-torch.inf).unflatten(1, (-1, s.block))
    highest = scores.amax((2, 3), keepdim=True)
    return (scores - highest.nan_to_num(neginf=0.0)).exp().sum(2)


def value_bias(s: Prefill, stride: int, term: str) -> Tensor:
    """How much larger than others the values of each block are, [Hkv, Pk], not negative.

    Args:
        term: "znorm": mean over the block of max(0, z), z the z-score, over the head's strides, of the logarithm of the
            largest norm in a stride; "log": max(0, ln of the largest norm in the block).
    Source: arXiv:2603.06274; znorm is the authors' code, log the paper.
    """
    norms = torch.linalg.vector_norm(s.v.float(), dim=-1)
    if term == "log":
        return torch.nn.functional.pad(norms, (0, -s.kv_len % s.block)).unflatten(-1, (-1, s.block)).amax(-1).clamp(min=1).log()
    largest = torch.nn.functional.pad(norms, (0, -s.kv_len % stride)).unflatten(-1, (-1, stride)).amax(-1)
    logs = (largest + 1e-6).log()
    std = logs.std(-1, keepdim=True) if logs.shape[-1] > 1 else torch.zeros_like(logs)
    z = ((logs - logs.mean(-1, keepdim=True)) / (std + 1e-6)).clamp(min=0)
    parts = s.block // stride
    return block_sums(z, parts) / _sizes(z.shape[-1], parts, z.device)
