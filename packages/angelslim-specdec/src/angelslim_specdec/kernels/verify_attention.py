"""Attention of tokens under verification: to what a row has confirmed, and among the new ones to ancestors.

Shapes: q [B, Hq, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; S slots, or with no cache the T tokens themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from angelslim_core.kernels import Implementation, Kernel, triton_runs

if TYPE_CHECKING:
    from ..attention import Visible

# a program keeps what a token sees of them in 64 bits
MOST_TOKENS = 64


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


def _triton(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, window: int | None = None) -> Tensor:
    from .triton.verify_attention import verify_attention

    return verify_attention(q, k, v, visible, scale, window)


def on_cpu(first: Tensor, *_: object, **__: object) -> tuple[bool, str]:
    """Where the torch forms run."""
    return first.device.type == "cpu", "tensors on the CPU"


def on_gpu(first: Tensor) -> tuple[bool, str]:
    """Where Triton's do: on the CPU in its interpreter."""
    import triton

    return first.is_cuda or bool(triton.knobs.runtime.interpret), "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"


def _fits(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, window: int | None = None) -> tuple[bool, str]:
    if visible.lengths is None:
        return False, "keys in slots, behind which the tokens lie"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False, "no gradients"
    new = q.shape[2] if visible.ancestors is None else visible.ancestors.shape[2]
    if new > MOST_TOKENS or max(q.shape[3], v.shape[3]) > 256:
        return False, f"up to {MOST_TOKENS} tokens, and heads up to 256 wide"
    return on_gpu(q)


VERIFY_ATTENTION = Kernel(
    "specdec.verify_attention",
    reference,
    (Implementation("torch", _sdpa, on_cpu), Implementation("triton", _triton, _fits, triton_runs), Implementation("sdpa", _sdpa)),
)
