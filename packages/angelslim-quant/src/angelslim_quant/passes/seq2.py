"""SEQ at 2 bits: four levels, none of them zero, under ranges that training learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from angelslim_core.passes import PassConfig, TrainedPass
from angelslim_core.schemes import Scheme

from ..grouped import levels_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.fake_quant import FakeQuantizer


class Seq2(TrainedPass):
    """2-bit weights, +-1 and +-3 quarters of a learnt range, trained along with it by a later step (SEQ of ParetoQ)."""

    id = "quant.seq2"
    claims = frozenset({"linear.weight"})

    class Config(PassConfig):
        group_size: int | None = Field(64, ge=8, description="Inputs that share a range; must divide the inputs of every linear. None: a whole output channel.")
        search: bool = Field(True, description="Begin with the ranges of least squared error, else with the largest magnitudes.")

    def scheme(self, site: Site) -> Scheme:
        return levels_scheme("seq2", site, self.config.group_size, (-3, -1, 1, 3))

    def quantizer(self, site: Site, weight_OI: Tensor) -> FakeQuantizer:
        from ..trained.seq2 import Seq2Quantizer

        return Seq2Quantizer(self.scheme(site), weight_OI, self.config.search)
