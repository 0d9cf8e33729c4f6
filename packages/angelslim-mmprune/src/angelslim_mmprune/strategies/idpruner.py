"""IDPruner: importance and diversity by maximal marginal relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..marginal_relevance import mmr
from ..picking import LAYER_MEANING, of_layer
from ..plan import Need, Plan, Pool
from ..scorer import soft_topk
from .learned import Learned


class IDPruner(Learned):
    """Keep what a learned scorer, or the encoder's attention, finds important and what is unlike that already kept.

    The paper scores by a learned scorer, which is one model's own. Attention of the encoder needs none; it is not what the paper
    measured, and has to be asked for.

    Source: arXiv:2602.13315 §3.
    """

    name = "idpruner"

    importance: Literal["scorer", "attention"] = Field("scorer", description="scorer: as published; attention: what tokens receive in the encoder")
    layer: int | None = Field(None, description=f"with importance=attention: {LAYER_MEANING}")
    imp: Literal["raw", "soft_topk"] = Field("raw", description="scores as published code takes them, or through the paper's differentiable top-k")
    soft_share: float = Field(0.2, gt=0, lt=1, description="of the tokens, that soft_topk adds up to")
    lam: float = Field(0.5, ge=0, le=1, description="1: importance alone; 0: diversity alone")
    parallel_k: int = Field(1, ge=1, le=2**20, description="tokens that are chosen by the same scores")

    @model_validator(mode="after")
    def _has_scores(self) -> IDPruner:
        if (self.importance == "scorer") != (self.scorer is not None):
            raise ValueError(
                "needs a scorer's folder, or importance=attention; without either there is divprune"
                if self.scorer is None
                else "is not read with importance=attention"
            )
        if self.importance == "scorer" and self.layer is not None:
            raise ValueError("layer is read with importance=attention only")
        return self

    @property
    def needs(self) -> tuple[Need, ...]:
        return (of_layer(self.layer, "importance"),) if self.importance == "attention" else ()

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        scores = self.scores(pool) if self.importance == "scorer" else pool.statistics[self.needs[0]].float()
        return Plan(mmr(pool.features, self._weights(scores, pool), keep, self.lam, self.parallel_k, counts=pool.counts))

    def _weights(self, scores: Tensor, pool: Pool) -> Tensor:
        if self.imp == "raw":
            return scores
        return soft_topk(scores, self.soft_share * pool.valid.sum(1).to(torch.float32), pool.valid)
