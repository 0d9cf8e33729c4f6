"""Parts that all drafts are made of.

Shapes: B sequences, T rows, S keys, H hidden, h heads, g heads of keys and values, D of a head, V vocabulary, Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from angelslim_core.errors import ModelError

from ..kernels.layer import rotate

# whose frequencies do not depend on how long the text is
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Rope(nn.Module):
    """Rotary position embedding in halves, as Llama's.

    Args:
        size: D, even.
        parameters: transformers' `rope_parameters`.

    Raises:
        ModelError: a type of scaling that changes with the length of the text.
    """

    bits: Tensor

    def __init__(self, size: int, parameters: Mapping[str, Any], max_positions: int) -> None:
        super().__init__()
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ModelError(715, f"rope_type {kind}", "is of no use to a draft", f"its frequencies must be fixed: {', '.join(ROPE_TYPES)}")
        self.scale = 1.0
        if kind == "default":
            frequencies = parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        else:
            from transformers import LlamaConfig
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            config = LlamaConfig(head_dim=size, rope_parameters=dict(parameters), max_position_embeddings=max_positions)
            frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        self.register_buffer("bits", frequencies.float().view(torch.int32), persistent=False)  # whole numbers stay as they are in draft.to(bfloat16)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, 1, T, D], fp32, of positions [B, T]."""
        angles = positions[:, None, :, None] * self.bits.view(torch.float32)
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * self.scale, angles.sin() * self.scale


class Attention(nn.Module):
    """Projections of grouped-query attention, which an attention stands between.

    Args:
        inputs: width of what is projected; H comes out.
        norm_eps: normalise queries and keys, each head by itself, as Qwen3 does; None: do not.
    """

    def __init__(self, inputs: int, hidden: int, heads: int, kv_heads: int, head_dim: int, norm_eps: float | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(inputs, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(inputs, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(inputs, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.q_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.k_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)

    def queries(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[B, h, T, D] of x [B, T, inputs]."""
        return rotate(self._heads(self.q_proj(x), self.q_norm), turn)

    def keys(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[B, g, T, D] of x [B, T, inputs]."""
        return rotate(self._heads(self.k_proj(x), self.k_norm), turn)

    def values(self, x: Tensor) -> Tensor:
        """[B, g, T, D] of x [B, T, inputs]."""
        return self._heads(self.v_proj(x), None)

    def out(self, attended: Tensor) -> Tensor:
        """[B, T, H] of [B, h, T, D]."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)


def draft_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A draft's rope: the target's theta and scaling, of its layers of full attention where it has several, over whole heads."""
    chosen = parameters if "rope_theta" in parameters else parameters["full_attention"]
    return {name: value for name, value in chosen.items() if name not in ("partial_rotary_factor", "mrope_section", "mrope_interleaved")}


def add_vocabulary(draft: nn.Module, vocab_size: int, draft_vocab_size: int) -> None:
    """Register `d2t` [Vd], int64 offsets (target's id = j + d2t[j]), and `t2d` [V], bool, where Vd < V; the first Vd ids until one is loaded."""
    if draft_vocab_size < vocab_size:
        draft.register_buffer("d2t", torch.zeros(draft_vocab_size, dtype=torch.int64))
        draft.register_buffer("t2d", torch.arange(vocab_size) < draft_vocab_size)


def vocabulary_ids(draft: nn.Module) -> Tensor | None:
    """The target's id of each of the draft's tokens [Vd], int64; None: they are the target's own."""
    d2t = getattr(draft, "d2t", None)
    return None if d2t is None else d2t + torch.arange(len(d2t), device=d2t.device)
