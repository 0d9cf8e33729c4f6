"""FastV: the tokens that the prompt's last token attends to most, in an early layer of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..finite import all_finite, require
from ..picking import kept, numbers, ranks
from ..plan import Need, Plan, Pool
from .base import Modality, Stage, Strategy


def most_seen(pool: Pool, row: Tensor, keep: Sequence[int], number: int, name: str) -> Plan:
    """The `keep` highest of a statistic [P, N] of each pool; of equal ones the first.

    Raises:
        NotFiniteError: under that number, it is NaN or infinite.
    """
    finite = all_finite(pool.valid, row)
    found = ranks(row.float(), pool.valid)
    plan = Plan(kept((found < numbers(keep, pool)[:, None]) & pool.valid, keep))
    require(finite, number, name)
    return plan


class FastV(Strategy):
    """Top tokens by the last token's attention, behind a layer.

    Source: arXiv:2403.06764, algorithm 1, and its published code: weights of the softmax over all that the token sees, text included, the mean
    over heads. Its K = 2 is `layer` 1: two layers see every token, and the weights are those of the second. Code that takes the softmax over
    media alone weighs heads otherwise.
    """

    name = "fastv"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    layer: int = Field(1, ge=0, description="layer of the language model, from 0, whose attention counts and behind which tokens go; the published K less 1")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer),)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("llm", self.layer, "last_row"),)

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        return most_seen(pool, pool.statistics[self.needs[0]], keep, 865, self.name)
