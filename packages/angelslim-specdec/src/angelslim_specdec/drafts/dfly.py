"""DFly: DFlash whose layers also weigh the features for themselves, and whose slots are corrected by the token drafted before them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from .block import BlockConfig
from .block_loss import Kind, Weighting
from .dflare import fused
from .dflash import DFlash
from .layers import RMSNorm


class DFlyConfig(BlockConfig):
    """The first of the two stages it is trained in; the second is `loss: e2e_tv`."""

    loss: Kind = "lk_hybrid"
    weighting: Weighting = "dpace"
    num_anchors: int = Field(128, ge=1, description="blocks of a sequence trained on at once")


class Correction(nn.Module):
    """What a slot's hidden gains from the token before: down(silu(gate z) * up z), z both normalised, side by side; 0 before training."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.hidden_norm, self.embed_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.gate_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.up_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        z = torch.cat((self.hidden_norm(hidden), self.embed_norm(before)), -1)
        return self.down_proj(functional.silu(self.gate_proj(z)) * self.up_proj(z))


class DFly(DFlash):
    """Context of layer l: hidden_norm(fc(features side by side) + sum_n softmax(w_l)_n h_n)."""

    name = "dfly"
    architecture = "Qwen3DFlyModel"
    Config: ClassVar[type[BlockConfig]] = DFlyConfig
    corrects = True

    def __init__(self, config: DFlyConfig) -> None:
        super().__init__(config)
        self.layer_fusion_weights = nn.Parameter(torch.zeros(config.num_hidden_layers, len(config.aux_hidden_state_layer_ids)))
        self.hidden_correction = Correction(config.hidden_size, config.rms_norm_eps)

    def initialise(self) -> None:
        super().initialise()
        nn.init.zeros_(self.hidden_correction.down_proj.weight)

    def contexts(self, aux: Tensor) -> Tensor:
        return self.hidden_norm(self.fc(aux) + fused(aux, self.layer_fusion_weights))

    def corrected(self, hidden: Tensor, before: Tensor) -> Tensor:
        return hidden + self.hidden_correction(hidden, before)
