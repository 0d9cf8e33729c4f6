"""Tokens unlike each other, by a DPP without relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..dpp import dpp
from ..plan import Plan, Pool
from .base import Modality, Strategy


class CDPruner(Strategy):
    """Greedy MAP of a DPP whose kernel is the cosines.

    Source: arXiv:2506.10967 with relevance 1, as Samp's paper runs it. The relevance of CDPruner itself comes from a text encoder that
    was trained beside the vision encoder, which no model here carries.
    """

    name = "cdpruner"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        alike = torch.ones(pool.features.shape[:2], device=pool.features.device)
        return Plan(dpp(pool.features, alike, keep, pool.counts))
