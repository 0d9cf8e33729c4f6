"""LSQ: integer weights, inputs, and an FP8 KV cache, under scales that training learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from angelslim_core.errors import PlanError
from angelslim_core.exporters import group_layouts
from angelslim_core.passes import PassConfig, TrainedPass
from angelslim_core.schemes import CacheScheme, Grid, Scheme

from ..grouped import check_group

if TYPE_CHECKING:
    from torch import Tensor, nn

    from angelslim_core.adapters.base import Site
    from angelslim_core.fake_cache import FakeCache
    from angelslim_core.fake_quant import FakeQuantizer


class LSQConfig(PassConfig):
    """Options of learnt scales."""

    bits: int = Field(4, ge=2, le=8, description="Bits a weight. Engines have fast kernels for 4 and 8.")
    group_size: int | None = Field(128, ge=8, description="Inputs that share a scale; must divide the inputs of every linear. None: a whole output channel.")
    symmetric: bool = Field(True, description="Without a zero point; else the range that training begins with fixes it.")
    search: bool = Field(True, description="Begin with the scales of least squared error, else with those of the whole range.")
    train_weights: bool = Field(False, description="Train the weights along with their scales; else only the scales.")
    activations: Literal["none", "int8"] = Field(
        "none", description="int8: round inputs to INT8 too, under one learnt scale a tensor; needs bits 8, channels and no zero point, as engines multiply."
    )
    kv: Literal["none", "fp8", "fp8_head"] = Field(
        "none",
        description="fp8: round keys (after RoPE) and values of all attentions to FP8 too, under learnt scales; fp8_head: under some for each key-value head.",
    )

    @model_validator(mode="after")
    def _is_multiplied(self) -> LSQConfig:
        if self.activations != "none" and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise ValueError("activations: int8 needs bits: 8, group_size: null and symmetric: true, for engines multiply nothing else by INT8 inputs")
        return self


class LSQ(TrainedPass):
    """Integer weights under learnt scales, INT8 inputs and an FP8 KV cache likewise if asked for, trained by a later step (LSQ)."""

    id = "quant.lsq"

    class Config(LSQConfig):
        pass

    @property
    def _rounds_inputs(self) -> bool:
        return bool(self.config.activations != "none")

    @property
    def trains_weight(self) -> bool:
        return bool(self.config.train_weights)

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        """What this step gives its final form."""
        return frozenset({"linear.weight", "linear.input"}) if self._rounds_inputs else frozenset({"linear.weight"})

    @property
    def cache(self) -> CacheScheme | None:
        return {"fp8": CacheScheme("tensor"), "fp8_head": CacheScheme("attn_head")}.get(self.config.kv)

    def cache_quantizer(self, heads: int) -> FakeCache:
        from ..trained.lsq_cache import LSQCache

        assert self.cache is not None
        return LSQCache(*self.cache.shape(heads))

    @property
    def joins_fused(self) -> bool:
        return self._rounds_inputs

    def scheme(self, site: Site) -> Scheme:
        config, size = self.config, self.config.group_size
        if size is not None:
            check_group(site, size)
        if self._rounds_inputs and site.expert is not None:
            raise PlanError(952, site.name, "sees other tokens in each process, which must agree on the scale of its inputs", "add experts to `ignore`")
        grid = Grid(config.bits, "int", "group" if size else "channel", size, symmetric=config.symmetric, scale_dtype=site.scale_dtype or site.dtype)
        if self._rounds_inputs:
            return Scheme("int8 static", grid, Grid(8, "int", "tensor"))
        name = f"int{config.bits} {f'g{size}' if size else 'channel'} {'sym' if config.symmetric else 'asym'}"
        return Scheme(name, grid, exporters=group_layouts(config.bits))

    def quantizer(self, site: Site, weight_OI: Tensor) -> FakeQuantizer:
        return self.quantizers({site: weight_OI})[site]

    def quantizers(self, weights: Mapping[Site, Tensor]) -> Mapping[Site, FakeQuantizer]:
        """Of linears that read one input: they share the parameter that is its scale."""
        import torch

        from ..trained.lsq import UNSEEN, LSQQuantizer, WeightsToo

        made = WeightsToo if self.config.train_weights else LSQQuantizer
        shared: nn.Parameter | None = None
        if self._rounds_inputs:
            shared = torch.nn.Parameter(torch.full((1,), UNSEEN, device=next(iter(weights.values())).device))
        return {site: made(self.scheme(site), weight, self.config.search, shared) for site, weight in weights.items()}
