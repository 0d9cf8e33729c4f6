"""Attention of tokens under verification: to what a row has confirmed, and among the new ones to ancestors.

Shapes: q [B, Hq, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; S slots, or with no cache the T tokens themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from angelslim_core.kernels import Implementation, Kernel

if TYPE_CHECKING:
    from ..attention import Visible


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, window: int | None = None) -> Tensor:
    """[B, Hq, T, Dv] in q's dtype, softmax in fp32."""
    batch, heads, tokens, _ = q.shape
    grouped = q.float().reshape(batch, k.shape[1], -1, tokens, q.shape[-1])
    scores = torch.einsum("bhgtd,bhsd->bhgts", grouped, k.float()) * scale
    scores = scores.masked_fill(~visible.mask(k.shape[2], window)[:, None], -torch.inf)
    return torch.einsum("bhgts,bhsd->bhgtd", scores.softmax(-1), v.float()).reshape(batch, heads, tokens, -1).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, window: int | None = None) -> Tensor:
    batch, heads, tokens, width = q.shape
    groups = heads // k.shape[1]
    if visible.is_causal(window):
        return scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, scale=scale, enable_gqa=groups > 1)
    if visible.lengths is None:  # a long prompt: few keys a query, so repeating them costs less than a mask for each group
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=visible.bias(k.shape[2], window, q.dtype), scale=scale)
    # heads that share keys become more queries of one head, so that no key is repeated
    bias = visible.bias(k.shape[2], window, q.dtype, groups)
    out = scaled_dot_product_attention(q.reshape(batch, k.shape[1], groups * tokens, width), k, v, attn_mask=bias, scale=scale)
    return out.reshape(batch, heads, tokens, -1)


VERIFY_ATTENTION = Kernel("specdec.verify_attention", reference, (Implementation("torch", _sdpa),))
