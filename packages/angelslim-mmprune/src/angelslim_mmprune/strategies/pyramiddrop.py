"""PyramidDrop: tokens go in stages, at each the ones that the prompt's last token attends to least."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from pydantic import Field, field_validator

from ..plan import Need, Plan, Pool
from .base import Modality, Stage, Strategy
from .fastv import most_seen

# behind 8, 16 and 24 of 32 layers
_PUBLISHED = (7, 15, 23)


class PyramidDrop(Strategy):
    """Every stage keeps the same share of what the one before left.

    `keep_ratio` is what the last stage leaves of all tokens; of S stages each keeps its S-th root. The published lambda of .5 at 3 stages is
    thus .125, the default, and shares are .5, .25 and .125. The mean over layers is higher: .46875 for the published schedule. No schedule that
    starts at a quarter of the depth has a mean of a quarter, which is why the budget does not say the mean.

    Source: arXiv:2410.17247, section 3.2, and its published code, with two differences: scores are the weights of the layer behind which
    tokens go, where that code computes those of the next layer before it drops; and positions are kept, where it counts anew.
    """

    name = "pyramiddrop"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    keep_ratio: float = Field(0.125, gt=0, le=1, description="share of the tokens that the last stage leaves; each keeps the same share of what it finds")
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, max_length=64, description="layers, from 0, behind which tokens go; none given: the last of the first, second and third quarter"
    )

    @field_validator("keep_tokens", mode="before")
    @classmethod
    def _no_tokens(cls, value: object) -> object:
        if value is not None:
            raise ValueError("stages share out keep_ratio; give that")
        return value

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers and (layers[0] < 0 or any(after <= before for before, after in pairwise(layers))):
            raise ValueError("must be numbers from 0, ascending")
        return layers

    def at_depth(self, layers: int) -> PyramidDrop:
        if self.layers is not None:
            return self
        quarters = sorted({max(1, layers * part // 4) - 1 for part in (1, 2, 3)})
        return self.model_copy(update={"layers": tuple(quarters)})

    @property
    def stages(self) -> tuple[Stage, ...]:
        layers = self.layers or _PUBLISHED
        # rounded, so that .125 gives .5 and .25
        shares = [round(self.keep_ratio ** (i / len(layers)), 12) for i in range(1, len(layers))]
        return tuple(Stage(layer, share) for layer, share in zip(layers, [*shares, self.keep_ratio], strict=True))

    @property
    def needs(self) -> tuple[Need, ...]:
        return tuple(Need("llm", stage.layer, "last_row") for stage in self.stages if stage.layer is not None)

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        # of the layer that ran last
        need = next(need for need in reversed(self.needs) if need in pool.statistics)
        return most_seen(pool, pool.statistics[need], keep, 866, self.name)
