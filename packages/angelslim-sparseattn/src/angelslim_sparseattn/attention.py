"""Select blocks, and attend to them.

Shapes: B sequences, Hq query heads, Hkv KV heads (Hq a multiple), L queries, which are the last of N keys; D and Dv wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .block_index import BlockIndex, Tokens
from .kernels.block_sparse import BLOCK_SPARSE
from .policies.base import Policy
from .prefill import Prefill
from .selection import selected, together

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Lengths(NamedTuple):
    """Real queries and keys of each sequence of a batch padded on the right."""

    q: tuple[int, ...]
    kv: tuple[int, ...]


def select(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, *, scale: float | None = None, block: int = 128,
    q_len: Sequence[int] | None = None, kv_len: Sequence[int] | None = None, prompt_len: int | None = None,
    check: bool | None = None,
) -> BlockIndex:  # fmt: skip
    """The blocks that the policy keeps, however short the sequences are.

    Args:
        q: [B, Hq, L, D], fp32, fp16 or bf16.
        k, v: [B, Hkv, N, D] and [B, Hkv, N, Dv].
        scale: what scores are multiplied by, above 0; D ** -0.5 if None.
        block: queries and keys a block, a multiple of 16.
        q_len, kv_len: real queries and keys of sequences padded on the right; all are real if None.
        prompt_len: tokens of the whole prompt where these are a chunk of it; the keys' number if None.
        check: look for NaN and infinity, which waits for a GPU once, at the end, and on a CPU also for an unsound index; by
            default on the CPU only. Without it the host waits for nothing, but with the policy "vecattention".

    Raises:
        UsageError: shapes or dtypes that do not fit, more queries than keys, NaN or infinity in what is real.
    """
    lengths = _lengths(q, k, v, q_len, kv_len)
    check, on_cpu = q.device.type == "cpu" if check is None else check, q.device.type == "cpu"
    finite = _finite(q, k, v, lengths) if check else None
    if finite is not None and on_cpu:
        _check(finite)
    index = _select(q, k, v, policy, lengths, _scale(q, scale), block, prompt_len, min_len=0)
    if finite is not None and not on_cpu:
        _check(finite)
    return index.check() if check and on_cpu else index


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, policy_or_index: Policy | BlockIndex, executor: str = "auto", return_lse: bool = False, *,
    scale: float | None = None, q_len: Sequence[int] | None = None, kv_len: Sequence[int] | None = None,
    prompt_len: int | None = None, layer: int | None = None, check: bool | None = None,
) -> Any:  # fmt: skip
    """Causal attention [B, Hq, L, Dv], in q's dtype, over kept blocks; with `return_lse` also the natural LSE [B, Hq, L], fp32.

    Rows without queries are 0, and their LSE -inf. With a policy, sequences shorter than its `min_len` and layers among its
    `dense_layers` attend to everything.

    Args:
        q, k, v, scale, q_len, kv_len, prompt_len: as of `select`; an index brings its own lengths.
        executor: "reference", "torch" (the same, for the CPU), "triton", "flex" (FlexAttention), "flash" (FlashAttention 4, on Hopper),
            "sdpa" (a mask of everything, for comparison), or "auto": the first of triton, flex and flash that takes the call, on a CPU the reference.
        layer: number of the model's layer that this is, for `dense_layers`.
        check: look for NaN and infinity, which waits for a GPU once, at the end, and for an unsound index where one is given or
            on a CPU; by default on the CPU only.

    Raises:
        UsageError: as of `select`; an index made for other sizes; no such executor.
        EngineError: the executor does not take the call.
    """
    check, on_cpu = q.device.type == "cpu" if check is None else check, q.device.type == "cpu"
    if isinstance(policy_or_index, BlockIndex):
        index = policy_or_index
        if (q_len is not None and tuple(q_len) != index.q_len) or (kv_len is not None and tuple(kv_len) != index.kv_len):
            raise UsageError(530, "sparse_attention", "the index was made for other lengths")
        lengths = _lengths(q, k, v, index.q_len, index.kv_len)
    else:
        index, lengths = None, _lengths(q, k, v, q_len, kv_len)
    finite = _finite(q, k, v, lengths) if check else None
    if finite is not None and on_cpu:
        _check(finite)
    scale, given = _scale(q, scale), index is not None
    if index is None:
        policy = policy_or_index
        dense = layer is not None and layer in policy.dense_layers  # type: ignore[union-attr]
        min_len = max(lengths.kv) + 1 if dense else policy.min_len  # type: ignore[union-attr]
        index = _select(q, k, v, policy, lengths, scale, 128, prompt_len, min_len)  # type: ignore[arg-type]
    _check_fits(index, q, k)
    if check and (given or on_cpu):
        index.check()
    out, lse = BLOCK_SPARSE(q, k, v, index, scale, executor=executor)
    if finite is not None and not on_cpu:
        _check(finite)
    return (out, lse) if return_lse else out


def _select(q: Tensor, k: Tensor, v: Tensor, policy: Policy, lengths: Lengths, scale: float, block: int, prompt_len: int | None, min_len: int) -> BlockIndex:
    if block < 16 or block % 16:
        raise UsageError(531, "select", f"a block is a multiple of 16, not {block}")
    if prompt_len is not None and prompt_len < max(lengths.kv):
        raise UsageError(533, "select", f"a prompt of {prompt_len} tokens has no {max(lengths.kv)} keys")
    rows, columns = -(-q.shape[2] // block), -(-k.shape[2] // block)
    found, blocks, delta = [], [], []
    for b, (queries, keys) in enumerate(zip(*lengths, strict=True)):
        s = Prefill(q[b, :, :queries], k[b, :, :keys], v[b, :, :keys], scale, block, prompt_len or keys)
        kept = selected(s, policy if keys >= min_len else None, policy.ordered)
        found.append(kept)
        blocks.append(s.rows)
        delta.append(kept.delta)
    whole = together(found, blocks, rows, columns, k.shape[2])
    assert whole.lists is not None
    tokens = None if whole.tokens is None else Tokens(whole.tokens.ptr, whole.tokens.col)
    shape = (*q.shape[:2], rows, columns)
    return BlockIndex(whole.lists.ptr, whole.lists.col, shape, *lengths, block, block, "per_q", whole.lists.order, tokens, tuple(delta))


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None and not 0 < scale < math.inf:
        raise UsageError(543, "scale", f"is above 0 and finite, not {scale}")
    return q.shape[-1] ** -0.5 if scale is None else scale


def _lengths(q: Tensor, k: Tensor, v: Tensor, q_len: Sequence[int] | None, kv_len: Sequence[int] | None) -> Lengths:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise UsageError(534, "q, k, v", f"have 4 dimensions [B, H, tokens, D], not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or 0 in (*q.shape, *k.shape, *v.shape):
        raise UsageError(535, "q, k, v", f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)} do not fit together")
    if q.shape[1] % k.shape[1]:
        raise UsageError(536, "q, k", f"{q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise UsageError(537, "q, k, v", f"are fp32, fp16 or bf16, all the same and on one device, not {q.dtype}, {k.dtype}, {v.dtype}")
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    found = Lengths((queries,) * batch if q_len is None else tuple(q_len), (keys,) * batch if kv_len is None else tuple(kv_len))
    if len(found.q) != batch or len(found.kv) != batch or max(found.q) > queries or max(found.kv) > keys:
        raise UsageError(538, "q_len, kv_len", f"{found.q} and {found.kv} do not fit {batch} sequences of {queries} queries and {keys} keys")
    if not all(0 < a <= b for a, b in zip(*found, strict=True)):
        raise UsageError(539, "q, k", f"a sequence has at least one query and no more queries than keys, not {found.q} and {found.kv}")
    return found


def _finite(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """Whether q, k and v are finite where they are real: bool [3], on their device."""
    ends = []
    for x, real in ((q, lengths.q), (k, lengths.kv), (v, lengths.kv)):
        parts = [x] if min(real) == x.shape[2] else [x[b, :, :n] for b, n in enumerate(real)]
        ends.append(torch.stack([end for part in parts for end in torch.aminmax(part)]).isfinite().all())
    return torch.stack(ends)


def _check(finite: Tensor) -> None:
    for name, ok in zip("qkv", finite.tolist(), strict=True):
        if not ok:
            raise UsageError(540, name, "holds NaN or infinity")


def _check_fits(index: BlockIndex, q: Tensor, k: Tensor) -> None:
    lists = q.shape[1] if index.heads == "per_q" else k.shape[1]
    wanted = (q.shape[0], lists, -(-q.shape[2] // index.block_m), -(-k.shape[2] // index.block_n))
    if index.shape != wanted:
        raise UsageError(541, "BlockIndex", f"was made for [B, H, Pq, Pk] = {index.shape}, where these tensors have {wanted}")
    if index.col.device != q.device:
        raise UsageError(542, "BlockIndex", f"is on {index.col.device}, the tensors on {q.device}")
