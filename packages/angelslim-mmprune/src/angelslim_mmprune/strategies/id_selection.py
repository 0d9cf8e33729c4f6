"""ID-Selection: important tokens one by one, each damping those like it (arXiv 2604.05601).

The rule is that of the paper's equations 7 to 9 as two public reimplementations of it state them alike, and gamma the paper's; the paper's
own section on its method was not at hand. It knows three kinds of importance: attention of the encoder, attention of the prompt's text, and
both; this is the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from ..dpp import ascending
from ..kernels.greedy import GREEDY
from ..picking import LAYER_MEANING, check_finite, of_layer
from ..plan import Need, Plan, Pool
from .base import Modality, Strategy


class IDSelection(Strategy):
    """Keep the token of the largest score s, take exp(-gamma d^2) s from each other one's at distance d = 1 - cos, down to 0; repeat.

    Scores begin as the encoder's attention, scaled to 0..1 within the pool. Tokens whose scores are all gone follow by their attention.
    """

    name = "id_selection"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    layer: int | None = Field(None, description=LAYER_MEANING)
    gamma: float = Field(20.0, ge=0, le=1e6, description="how fast damping ends with distance; very large: by attention alone")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (of_layer(self.layer, "importance"),)

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        attention = pool.statistics[self.needs[0]].float()
        least = attention.masked_fill(~pool.valid, torch.inf).amin(1, keepdim=True)
        spread = attention.masked_fill(~pool.valid, -torch.inf).amax(1, keepdim=True) - least
        importance = torch.where(spread > 0, (attention - least) / spread, 1)  # all alike: all of full weight, so that distance decides
        order = GREEDY(pool.features, importance, pool.counts, keep, "damped", self.gamma)
        check_finite(pool, attention)
        return Plan(ascending(order, pool.features.shape[1]))
