"""Sherry: 3:4-sparse ternary weights, trained: 1.25 bits and a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from angelslim_core.errors import PlanError
from angelslim_core.passes import PassConfig, TrainedPass
from angelslim_core.schemes import Scheme

from ..grouped import levels_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.fake_quant import FakeQuantizer


class Sherry(TrainedPass):
    """1.25-bit weights, of each four one zero and three signs under a scale a group, trained by a later step (Sherry)."""

    id = "quant.sherry"
    claims = frozenset({"linear.weight"})

    class Config(PassConfig):
        group_size: int | None = Field(
            128, ge=8, description="Inputs that share a scale; must divide the inputs of every linear. None: a whole output channel."
        )
        pattern: Literal["contiguous", "strided"] = Field(
            "contiguous", description="Which four have a zero: neighbours, as our packed layout stores them, or of 64 those 16 apart, as STQ1_0 does."
        )
        learn_scale: bool = Field(False, description="Train the scales; else each is the mean magnitude of the weights it keeps.")
        arenas: bool = Field(True, description="While training add a part of the unrounded weights' product, which rises to all of it and falls to nothing.")

    def scheme(self, site: Site) -> Scheme:
        unit = 4 if self.config.pattern == "contiguous" else 64
        size = self.config.group_size or site.shape[1]
        if size % unit:
            what = f"group_size {size} is" if self.config.group_size else f"its {size} inputs are"
            raise PlanError(950, site.name, f"{what} no multiple of {unit}, the weights among which one of four is zero ({self.config.pattern})")
        sparsity = (3, 4) if self.config.pattern == "contiguous" else None  # neighbours are what a grid can tell
        return levels_scheme("sherry", site, self.config.group_size, (-1, 0, 1), sparsity)

    def quantizer(self, site: Site, weight_OI: Tensor) -> FakeQuantizer:
        from ..trained.sherry import SherryQuantizer

        config = self.config
        return SherryQuantizer(self.scheme(site), weight_OI, config.pattern, config.learn_scale, config.arenas)
