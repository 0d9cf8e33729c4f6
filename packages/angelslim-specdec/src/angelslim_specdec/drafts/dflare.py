"""DFlare: each layer weighs the target's features for itself, and projects them apart from the block's rows.

Source: arXiv:2606.02091.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .block import BlockConfig, BlockDraft
from .layers import Attention


class TargetAttention(Attention):
    """With projections of the context of its own."""

    def __init__(self, inputs: int, hidden: int, heads: int, kv_heads: int, head_dim: int, norm_eps: float | None = None) -> None:
        super().__init__(inputs, hidden, heads, kv_heads, head_dim, norm_eps)
        self.k_proj_target = nn.Linear(inputs, kv_heads * head_dim, bias=False)
        self.v_proj_target = nn.Linear(inputs, kv_heads * head_dim, bias=False)


class DFlare(BlockDraft):
    """Context of layer l: hidden_norm(sum_n softmax(w_l)_n h_n)."""

    name = "dflare"
    architecture = "QwenDFlareDraftModel"
    num_layers = 7
    num_features = 9
    attention: ClassVar[type[Attention]] = TargetAttention

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.layer_fusion_weights = nn.Parameter(torch.zeros(config.num_hidden_layers, len(config.aux_hidden_state_layer_ids)))

    def initialise(self) -> None:
        super().initialise()
        layers, features = self.layer_fusion_weights.shape
        for layer in range(layers):  # early layers begin with early features
            self.layer_fusion_weights.data[layer, min(features - 1, layer * features // layers)] = 2.0

    def contexts(self, aux: Tensor) -> Tensor:
        return self.hidden_norm(fused(aux, self.layer_fusion_weights))

    def context_projections(self, attn: Any) -> tuple[nn.Linear, nn.Linear]:
        return attn.k_proj_target, attn.v_proj_target


def fused(aux: Tensor, weights: Tensor) -> Tensor:
    """[L, B, T, H] of aux [B, T, n H] and weights [L, n], whose softmax it is."""
    return torch.einsum("ln,btnh->lbth", weights.float().softmax(-1).to(aux.dtype), aux.unflatten(-1, (weights.shape[1], -1)))
