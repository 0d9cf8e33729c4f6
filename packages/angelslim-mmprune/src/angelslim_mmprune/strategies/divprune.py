"""DivPrune: the tokens that lie furthest apart (arXiv 2502.02175, its max-min diversity problem, solved greedily)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..picking import Cosines, check_finite, kept, one_by_one, unit
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
        cosines = Cosines(unit(pool.features, pool.valid))
        closest = torch.full_like(cosines.rows[..., 0], -1)  # [P, N]: cosine to the nearest kept token

        def after(token: Tensor) -> Tensor:
            torch.maximum(closest, cosines.of(token), out=closest)
            return -closest

        chosen = one_by_one(pool.valid, keep, -cosines.nearest(pool.valid), after)
        check_finite(pool)
        return Plan(kept(chosen, keep))
