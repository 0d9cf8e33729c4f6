"""torch's scaled_dot_product_attention under a mask of everything that an index keeps: quadratic memory a block of queries, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..block_index import BlockIndex

QUERIES = 1024


def attend(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """As the reference, 1024 queries at a time; the LSE comes from scores in fp32."""
    groups, share = q.shape[1] // k.shape[1], q.shape[1] // index.shape[1]
    out, lse = q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    blocks, singles = index.to_bool(), None if index.tokens is None else _singles(index)
    for b, (queries, keys) in enumerate(zip(index.q_len, index.kv_len, strict=True)):
        key = torch.arange(keys, device=q.device)
        kb, vb = (x[b, :, :keys].repeat_interleave(groups, 0) for x in (k, v))
        for start in range(0, queries, QUERIES):
            x = torch.arange(start, min(start + QUERIES, queries), device=q.device)
            keep = blocks[b][:, x // index.block_m][:, :, key // index.block_n]
            if singles is not None:
                keep = keep | singles[b][:, x // index.block_m, :keys]
            keep = (keep & (key <= x[:, None] + keys - queries)).repeat_interleave(share, 0)
            qx = q[b, :, x]
            out[b, :, x] = scaled_dot_product_attention(qx, kb, vb, attn_mask=keep, scale=scale)
            lse[b, :, x] = (qx.float() @ kb.float().mT * scale).masked_fill(~keep, -torch.inf).logsumexp(-1)
    return out, lse


def _singles(index: BlockIndex) -> Tensor:
    """Single keys [B, H, Pq, N] as bool."""
    assert index.tokens is not None
    cells = torch.zeros(len(index.row_ptr) - 1, max(index.kv_len), dtype=torch.bool, device=index.col.device)
    rows = torch.repeat_interleave(torch.arange(len(cells), device=cells.device), index.tokens.ptr.diff())
    cells[rows, index.tokens.col[: len(rows)].long()] = True
    return cells.view(*index.shape[:3], -1)
