"""Tequila: ternary weights, trained; those rounded to zero work on as a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from angelslim_core.passes import Pass, PassConfig, TrainedPass
from angelslim_core.schemes import Scheme

from ..grouped import levels_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.fake_quant import FakeQuantizer


class TequilaConfig(PassConfig):
    """Options of ternary weights."""

    group_size: int | None = Field(128, ge=8, description="Inputs that share a scale; must divide the inputs of every linear. None: a whole output channel.")
    threshold: Literal["absmean", "twn"] = Field(
        "absmean",
        description="What is rounded to zero, and the scale: absmean: below half the mean magnitude, which is the scale; twn: below .75 of it, the mean of the rest.",
    )
    reactivation: float = Field(
        1e-3, ge=0, le=1, description="Lambda: part of the sum of an output's zeroed weights that is its bias. 0: plain ternary, no bias."
    )
    learn_reactivation: bool = Field(False, description="Train lambda, one a linear, from `reactivation` on.")

    @model_validator(mode="after")
    def _trains_something(self) -> TequilaConfig:
        if self.learn_reactivation and not self.reactivation:
            raise ValueError("learn_reactivation: there is nothing to train from a reactivation of 0")
        return self


class Tequila(TrainedPass):
    """Ternary weights in groups, trained by a later step; those rounded to zero work on as a bias of each output (Tequila)."""

    id = "quant.tequila"
    claims = frozenset({"linear.weight"})
    adds_bias: ClassVar[bool] = True

    class Config(TequilaConfig):
        pass

    @classmethod
    def bind(cls, config: PassConfig) -> Pass:
        assert isinstance(config, TequilaConfig)
        return cls(config) if config.reactivation else Ternary(config)

    def scheme(self, site: Site) -> Scheme:
        return levels_scheme("ternary", site, self.config.group_size, (-1, 0, 1))

    def quantizer(self, site: Site, weight_OI: Tensor) -> FakeQuantizer:
        from ..trained.tequila import TequilaQuantizer

        config = self.config
        return TequilaQuantizer(self.scheme(site), config.threshold, config.reactivation, config.learn_reactivation)


class Ternary(Tequila):
    """Ternary weights, trained, without a bias: what `Tequila` is with a `reactivation` of 0."""

    adds_bias = False
