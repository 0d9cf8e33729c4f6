"""A multi-token-prediction head: one more decoder layer behind the target's last, with the target's own head, run again for each further token.

Source: DeepSeek-V3 (arXiv:2412.19437) §2.2, one layer reused; trained on its own choices.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from .base import Heads
from .layers import RMSNorm, vocabulary_ids
from .stepwise import Stepwise, StepwiseConfig, layer_parts


class MTPConfig(StepwiseConfig):
    """An MTP head's training unrolls fewer steps, all of the same weight, on the draft's own choices."""

    ttt_steps: int = Field(4, ge=1, le=16, description="tokens ahead that training unrolls")
    ttt_decay: float = Field(1.0, gt=0, le=1, description="weight of each step, of the one before")
    on_policy: bool = Field(True, description="later steps embed the draft's own first choice instead of the text")


class MTP(Stepwise):
    """fc of [embedding, features], each normalised, one decoder layer, norm; the target's head reads it, and so does the next step."""

    name: ClassVar[str] = "mtp"
    architecture: ClassVar[str] = "MTPDraftModel"
    Config: ClassVar[type[StepwiseConfig]] = MTPConfig
    target_norm: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        hidden, width, eps = config.hidden_size, config.target_hidden_size, config.rms_norm_eps
        # layers are tapped before the target's last norm, whose output the head is to read
        self.register_buffer("target_norm", torch.ones(width))
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = RMSNorm(width, eps), RMSNorm(width, eps)
        self.fc = nn.Linear(2 * width, hidden, bias=False)
        self.layers = nn.ModuleList([nn.ModuleDict({"input_layernorm": RMSNorm(hidden, eps), **layer_parts(config, hidden)})])
        self.norm = RMSNorm(hidden, eps)

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        return (layers - 1,)

    @torch.no_grad()
    def begin(self, heads: Heads, norm: Tensor | None = None) -> None:
        """The target's last norm is what the target has, and the head's own starts from it."""
        if norm is not None:
            self.target_norm.copy_(norm)
            self.norm.weight.copy_(norm)

    @property
    def layer(self) -> nn.ModuleDict:
        layer = self.layers[0]
        assert isinstance(layer, nn.ModuleDict)
        return layer

    @property
    def norms(self) -> tuple[RMSNorm, RMSNorm]:
        return self.pre_fc_norm_embedding, self.pre_fc_norm_hidden

    @property
    def feeds_normed(self) -> bool:
        return True

    def features(self, aux: Tensor) -> Tensor:
        norm = self.target_norm
        return functional.rms_norm(aux.to(norm.dtype), norm.shape, norm, self.config.rms_norm_eps)

    def mixed(self, pair: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.fc(pair)
        return hidden, self.layer["input_layernorm"](hidden)

    def head_weight(self, heads: Heads) -> Tensor:
        ids = vocabulary_ids(self)
        return (heads.head if ids is None else heads.head[ids]).to(self.fc.weight.dtype)
