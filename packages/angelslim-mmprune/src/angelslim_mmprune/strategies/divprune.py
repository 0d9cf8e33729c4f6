"""DivPrune: the tokens that lie furthest apart (arXiv 2502.02175, its max-min diversity problem, solved greedily)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..dpp import ascending
from ..kernels.greedy import GREEDY
from ..picking import check_finite
from ..plan import Plan, Pool
from .base import Modality, Strategy


class DivPrune(Strategy):
    """Keep tokens that are far from each other, by the distance 1 - cos of their features.

    The first is the token whose nearest neighbour is furthest; each further one is the furthest from those kept. A token is kept once only,
    where the original code may take it twice among copies.
    """

    name = "divprune"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        order = GREEDY(pool.features, pool.features.new_zeros(pool.features.shape[:2], dtype=torch.float32), pool.counts, keep, "apart")
        check_finite(pool)
        return Plan(ascending(order, pool.features.shape[1]))
