"""DSpark: DFlash with a bias of low rank from the token drafted before, and a head that tells how sure a slot is.

Source: arXiv:2607.05147.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from .block import BlockConfig
from .block_loss import Kind
from .dflash import DFlash


class DSparkConfig(BlockConfig):
    """As published: blocks of 7, each row drafts the token after it."""

    block_size: int = Field(7, ge=2, description="rows of a block: the last token, then masks")
    sample_from_anchor: bool = Field(True, description="slot s drafts the token after it, so that a block gives block_size tokens; else its own")
    loss: Kind = "ce_tv"
    markov_rank: int = Field(256, ge=1, description="rank of the bias from the token before")


class Markov(nn.Module):
    """Logits' bias from the token before; 0 before training."""

    def __init__(self, vocab: int, draft_vocab: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab, bias=False)

    def forward(self, before: Tensor) -> Tensor:
        return self.markov_w2(self.markov_w1(before))


class Confidence(nn.Module):
    """The chance that a slot's token is accepted, as a logit."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)[..., 0]


class DSpark(DFlash):
    """DFlash, its logits biased by the token before."""

    name = "dspark"
    architecture = "Qwen3DSparkModel"
    Config: ClassVar[type[BlockConfig]] = DSparkConfig
    biases = True
    needs_target = True

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.markov_head = Markov(config.vocab_size, config.draft_vocab_size, config.markov_rank)
        self.confidence_head = Confidence(config.hidden_size + config.markov_rank)

    def initialise(self) -> None:
        super().initialise()
        nn.init.normal_(self.markov_head.markov_w1.weight, std=self.config.markov_rank**-0.5)
        nn.init.zeros_(self.markov_head.markov_w2.weight)
        nn.init.zeros_(self.confidence_head.proj.bias)

    def bias(self, before: Tensor) -> Tensor:
        return self.markov_head(before)

    def confidence(self, hidden: Tensor, before: Tensor) -> Tensor:
        return self.confidence_head(torch.cat((hidden, self.markov_head.markov_w1(before).to(hidden.dtype)), -1))
