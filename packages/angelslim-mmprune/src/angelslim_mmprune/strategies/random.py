"""Tokens by lot: what every other strategy has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from ..plan import Plan, Pool
from .base import Modality, Strategy


class Random(Strategy):
    """Keep tokens by lot."""

    name = "random"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    seed: int = Field(0, ge=0, lt=2**63, description="of the draw, which depends on nothing else but the pool's number of tokens")

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        kept = []
        for tokens, count in zip(pool.counts, keep, strict=True):
            generator = torch.Generator().manual_seed(self.seed)
            kept.append(torch.randperm(tokens, generator=generator)[:count].to(pool.features.device, non_blocking=True))
        return Plan.of(kept)
