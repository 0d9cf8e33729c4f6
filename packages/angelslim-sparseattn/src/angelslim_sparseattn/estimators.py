"""How much each block of keys matters to each block of queries, found without computing attention.

Shapes: Hq query and Hkv KV heads, L queries, N keys, Pq and Pk blocks of b, strides of s tokens (s divides b), R = b / s.
All results are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from angelslim_core.errors import UsageError
from angelslim_core.kernels import Implementation, Kernel, triton_runs

from .kernels.select_rows import on_cpu, on_gpu
from .prefill import Prefill

# groups of queries that are scored at a time: bounds the memory of antidiagonal scores
_GROUPS = 2048
# a block within this of a row's highest score owns its maximum
OWNS = 0.999


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


def _divides(stride: int, block: int) -> None:
    if block % stride:
        raise UsageError(532, "stride", f"{stride} does not divide the block of {block}")


def strided(x: Tensor, block: int, stride: int, reverse: bool) -> Tensor:
    """[H, P, R, s * D]: the tokens of each stride side by side, those of queries in reverse; zeros after the last."""
    parts = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block // stride, stride))
    return (parts.flip(3) if reverse else parts).flatten(3)


def _pooled(x: Tensor, block: int, stride: int, reverse: bool) -> Tensor:
    """[H, P, s * D]: mean over a block's strides of the tokens side by side, rounded to x's dtype as the product's factors are."""
    sums = strided(x, block, stride, reverse).sum(2)
    return (sums * (stride / _sizes(x.shape[1], block, x.device)[:, None])).to(x.dtype).float()


def _antidiagonal_mean(s: Prefill, stride: int, bias: Tensor | None, weight: float) -> Tensor:
    """[Hq, Pq, Pk]: mean over a block's R x R cells of X[a, e] = c / s * sum over t < s of q[a s + s - 1 - t] . k[e s + t], and `weight` times bias.

    The mean is linear, so that queries and keys are summed first: one product of Pq x (s D) x Pk. Of blocks that end early it
    is the mean over the tokens there are.

    Args:
        bias: [Hkv, Pk], or none.
    """
    score = products(_pooled(s.q, s.block, stride, True), _pooled(s.k, s.block, stride, False)) * (s.scale / stride)
    return score if bias is None else score.add_(bias.repeat_interleave(s.groups, 0)[:, None], alpha=weight)


def antidiagonal_cells(s: Prefill, stride: int) -> Iterator[tuple[int, slice, Tensor]]:
    """X of `_antidiagonal_mean` cell by cell: (head, its query blocks, [blocks, R, Pk, R]); -inf where a key is later than
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


def _antidiagonal_mass(s: Prefill, stride: int, owners: bool) -> Tensor:
    """[Hq, Pq, Pk]: softmax of each row of antidiagonal scores, summed over blocks and rows that have queries.

    With `owners`, of each row and block the highest score alone counts, by its distance from the row's highest, and blocks
    that come within a factor of 0.999 of it in any row have a negative sign.
    Source: XAttention, and CoSA.
    """
    mass = torch.zeros(len(s.q), s.rows, s.columns, dtype=torch.float32, device=s.q.device)
    for head, blocks, x in antidiagonal_cells(s, stride):
        if owners:
            highest = x.amax(-1)
            share = (highest - highest.amax(-1, keepdim=True)).exp()
        else:
            share = x.flatten(2).softmax(-1).view_as(x).sum(-1)
        share = share * real_groups(s, stride, blocks)[..., None]
        found = share.sum(1)
        mass[head, blocks] = torch.where((share >= OWNS).any(1), -found, found) if owners else found
    return mass


def last_attention(s: Prefill, queries: int) -> Tensor:
    """Attention [Hq, r, N] of the last r = min(queries, L) queries, exact and causal."""
    queries = min(queries, s.q_len)
    scores = products(s.q[:, -queries:].float(), s.k.float()).mul_(s.scale)
    position = torch.arange(s.kv_len - queries, s.kv_len, device=scores.device)
    later = torch.arange(s.kv_len, device=scores.device) > position[:, None]
    return scores.masked_fill_(later, -torch.inf).softmax(-1)


def diagonal_sums(attention: Tensor) -> Tensor:
    """[H, N]: attention [H, r, N] of the last r queries summed over keys as far from their query as the place in the result."""
    heads, queries, keys = attention.shape
    width = keys + queries - 1
    # row r begins one place earlier than row r - 1, so that a distance is a column
    back = torch.nn.functional.pad(attention.flip(-1), (0, queries - 1))
    return back.as_strided((heads, queries, keys), (queries * width, width - 1, 1), queries - 1).sum(1)


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sums [..., P] over the blocks of x [..., N]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def pooled(s: Prefill) -> Tensor:
    """Scores [Hq, Pq, Pk] of mean queries and mean keys."""
    return products(means(s.q, s.block), means(s.k, s.block)) * s.scale


def _mean_key_mass(s: Prefill) -> Tensor:
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
    _divides(stride, s.block)
    if term == "log":
        norms = torch.linalg.vector_norm(s.v, dim=-1, dtype=torch.float32)
        return torch.nn.functional.pad(norms, (0, -s.kv_len % s.block)).unflatten(-1, (-1, s.block)).amax(-1).clamp(min=1).log()
    return VALUE_BIAS(s, stride)


def _value_bias(s: Prefill, stride: int) -> Tensor:
    """`value_bias` by z-scores."""
    norms = torch.linalg.vector_norm(s.v.float(), dim=-1)
    largest = torch.nn.functional.pad(norms, (0, -s.kv_len % stride)).unflatten(-1, (-1, stride)).amax(-1)
    logs = (largest + 1e-6).log()
    std = logs.std(-1, keepdim=True) if logs.shape[-1] > 1 else torch.zeros_like(logs)
    z = ((logs - logs.mean(-1, keepdim=True)) / (std + 1e-6)).clamp(min=0)
    parts = s.block // stride
    return block_sums(z, parts) / _sizes(z.shape[-1], parts, z.device)


def antidiagonal_mean(s: Prefill, stride: int, bias: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """As `_antidiagonal_mean`; what comes after a row's last position may hold anything."""
    _divides(stride, s.block)
    return ANTIDIAGONAL_MEAN(s, stride, bias, weight)


def antidiagonal_mass(s: Prefill, stride: int, owners: bool = False) -> Tensor:
    """As `_antidiagonal_mass`; what comes after a row's last position may hold anything."""
    _divides(stride, s.block)
    return ANTIDIAGONAL_MASS(s, stride, owners)


def mean_key_mass(s: Prefill) -> Tensor:
    """As `_mean_key_mass`; what comes after a row's last position may hold anything."""
    return MEAN_KEY_MASS(s)


def _antidiagonal_mean_triton(s: Prefill, stride: int, bias: Tensor | None, weight: float) -> Tensor:
    from .kernels.triton.pooled import antidiagonal_mean

    return antidiagonal_mean(s, stride, bias, weight)


def _value_bias_triton(s: Prefill, stride: int) -> Tensor:
    from .kernels.triton.pooled import value_bias

    return value_bias(s, stride)


def _antidiagonal_mass_triton(s: Prefill, stride: int, owners: bool) -> Tensor:
    from .kernels.triton.mass import antidiagonal_mass

    return antidiagonal_mass(s, stride, owners)


def _mean_key_mass_triton(s: Prefill) -> Tensor:
    from .kernels.triton.mass import mean_key_mass
    from .kernels.triton.pooled import pool

    return mean_key_mass(s, pool(s.k, s.block, 1, False, 1.0))


def _kernel(op: str, reference: Callable[..., Tensor], by_triton: Callable[..., Tensor]) -> Kernel:
    return Kernel(f"sparseattn.{op}", reference, (Implementation("torch", reference, on_cpu), Implementation("triton", by_triton, on_gpu, triton_runs)))


ANTIDIAGONAL_MEAN = _kernel("antidiagonal_mean", _antidiagonal_mean, _antidiagonal_mean_triton)
VALUE_BIAS = _kernel("value_bias", _value_bias, _value_bias_triton)
ANTIDIAGONAL_MASS = _kernel("antidiagonal_mass", _antidiagonal_mass, _antidiagonal_mass_triton)
MEAN_KEY_MASS = _kernel("mean_key_mass", _mean_key_mass, _mean_key_mass_triton)
