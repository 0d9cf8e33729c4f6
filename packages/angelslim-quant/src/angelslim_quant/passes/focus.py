"""FOCUS: FP4 weights whose block scales are trained, the weights themselves frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from angelslim_core.exporters.modelopt import nvfp4_scheme
from angelslim_core.passes import PassConfig, TrainedPass
from angelslim_core.schemes import Scheme

from ..microscaled import fits, mx_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.fake_quant import FakeQuantizer


class FocusConfig(PassConfig):
    """Options of learnt FP4 scales."""

    format: Literal["nvfp4", "mxfp4"] = Field("nvfp4", description="nvfp4: blocks of 16 under an E4M3 scale; mxfp4: blocks of 32 under a power of two.")
    weight_only: bool = Field(True, description="Leave activations in 16 bits; else they are MXFP4 too, scaled at run time.")

    @model_validator(mode="after")
    def _knows_its_inputs(self) -> FocusConfig:
        if self.format == "nvfp4" and not self.weight_only:
            raise ValueError("weight_only: false goes with format: mxfp4; NVFP4 inputs need calibrated scales, which quant.nvfp4 takes")
        return self


class Focus(TrainedPass):
    """FP4 weights under block scales that a later step trains, the weights frozen (FOCUS): NVFP4 or MXFP4.

    Linears that engines run as one matmul (q, k, v; gate, up) share the fp32 scale of NVFP4.
    """

    id = "quant.focus"

    class Config(FocusConfig):
        pass

    @property
    def trains_weight(self) -> bool:
        return False

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        """What this step gives its final form."""
        return frozenset({"linear.weight"}) if self.config.weight_only else frozenset({"linear.weight", "linear.input"})

    @property
    def joins_fused(self) -> bool:
        return bool(self.config.format == "nvfp4")

    def scheme(self, site: Site) -> Scheme:
        return fits(site, nvfp4_scheme(False) if self.config.format == "nvfp4" else mx_scheme(4, self.config.weight_only))

    def quantizer(self, site: Site, weight_OI: Tensor) -> FakeQuantizer:
        return self.quantizers({site: weight_OI})[site]

    def quantizers(self, weights: Mapping[Site, Tensor]) -> Mapping[Site, FakeQuantizer]:
        """Of linears that engines fuse."""
        import torch

        from ..numerics.microscale import weight_scale_of
        from ..trained.focus import FocusQuantizer

        t = None
        if self.config.format == "nvfp4":
            t = weight_scale_of(torch.stack([w.abs().amax() for w in weights.values()]).amax())
        return {site: FocusQuantizer(self.scheme(site), weight, t) for site, weight in weights.items()}
