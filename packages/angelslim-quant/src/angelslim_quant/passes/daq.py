"""Delta-Aware Quantization: data-free, for a model that was trained from another one (2603.22324)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from angelslim_core.errors import ModelError, NumericError
from angelslim_core.exporters.hf_fp8 import block_scheme
from angelslim_core.exporters.modelopt import nvfp4_scheme
from angelslim_core.passes import PassConfig, TensorPass
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_core.source import Source, open_source

from ..grouped import GroupedConfig, grouped_scheme
from ..microscaled import fits

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context

    from ..numerics.delta import Metric, Search

# by format: options that only it knows, and the ratios to absmax's scale that are tried: floats lose by cutting the largest
# weights (KL, benchmarks/daq_behaviour.py), integers gain
_ONLY = {"granularity": "fp8", "block_size": "fp8", "group_size": "int4", "symmetric": "int4"}
_RANGE = {"fp8": (1.0, 1.9), "int4": (0.5, 1.1), "nvfp4": (1.0, 1.6)}


class DAQConfig(PassConfig):
    """Options of DAQ."""

    base: Path = Field(description="Folder of the model that this one was trained from, in 16 bits or block FP8.")
    metric: Literal["joint", "sign", "cosine", "mse"] | None = Field(
        None,
        description="What scales keep most of: sign, the rate of changes whose sign survives; cosine, their direction; joint, the mean of both, neither below absmax's; mse, the weights. Unset: joint for fp8 rounded to nearest, else mse, as what a group of few weights keeps of the change is chance.",
    )
    format: Literal["fp8", "int4", "nvfp4"] = Field("fp8", description="fp8: weights and inputs; int4 and nvfp4: weights only.")
    granularity: Literal["block", "channel"] = Field("block", description="fp8: what shares a scale.")
    block_size: int = Field(128, ge=8, le=4096, description="fp8: rows and columns of a block. Engines need it to divide every dimension.")
    group_size: int = Field(128, ge=8, description="int4: inputs that share a scale; must divide the inputs of every linear.")
    symmetric: bool = Field(True, description="int4: without a zero point.")
    search: Literal["coarse", "dense"] = Field(
        "coarse", description="coarse: 5 scales, then 10 around the best; dense: 48, evenly spaced. Absmax's is always among them."
    )
    min_range: float | None = Field(None, gt=0, le=1, description="Least scale that is tried, in parts of absmax's; unset 1, int4 0.5.")
    max_range: float | None = Field(None, gt=1, le=4, description="Largest; unset: fp8 1.9, nvfp4 1.6, int4 1.1.")
    rounding: Literal["nearest", "delta"] = Field(
        "nearest", description="delta: round weights to the neighbour on the side of the change where that gains most for its error, within max_projection."
    )
    max_projection: float = Field(
        1.2, gt=0, le=4, description="rounding delta: how far along the change the stored weights go as a whole; 1 is as far as training went."
    )
    scale_fmt: Literal["float32"] = Field("float32", description="Powers of two are refused: E4M3 times two is E4M3, so that they leave nothing to choose.")

    @field_validator("scale_fmt", mode="before")
    @classmethod
    def _no_powers_of_two(cls, value: object) -> object:
        if value == "ue8m0":
            raise ValueError("power-of-two scales leave nothing to choose: E4M3 values times two are E4M3 values; use quant.fp8_block")
        return value

    @model_validator(mode="after")
    def _of_the_format(self) -> DAQConfig:
        for name, owner in _ONLY.items():
            if name in self.model_fields_set and self.format != owner:
                raise ValueError(f"{name} is an option of format {owner}, not of {self.format}")
        if "max_projection" in self.model_fields_set and self.rounding != "delta":
            raise ValueError("max_projection is an option of rounding delta")
        return self


class DAQ(TensorPass):
    """FP8, INT4 or NVFP4 weights whose scales keep what training changed in a base model (Delta-Aware Quantization)."""

    id = "quant.daq"

    class Config(DAQConfig):
        pass

    def __init__(self, config: PassConfig | None = None, base: Source | None = None, lacking: frozenset[str] = frozenset()) -> None:
        self.config: Any = config
        self._base, self._lacking = base, lacking

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        """What this step gives its final form."""
        return frozenset({"linear.weight", "linear.input"}) if self.config.format == "fp8" else frozenset({"linear.weight"})

    @property
    def joins_fused(self) -> bool:
        return bool(self.config.format == "nvfp4")

    @property
    def sources(self) -> Sequence[Source]:
        return () if self._base is None else (self._base,)

    def settle(self, sites: Sequence[Site], source: Source) -> DAQ:
        base, lacking = open_source(self.config.base), set()
        ours, theirs = (s.config.get("architectures") for s in (source, base))
        if ours and theirs and ours != theirs:
            raise ModelError(410, self.config.base.name, f"is {' '.join(map(str, theirs))}, but what was trained from it is {' '.join(map(str, ours))}")
        for site in sites:
            if site.tensor not in base.shapes:
                lacking.add(site.name)
            elif base.shapes[site.tensor] != source.shapes[site.tensor]:
                shapes = f"{list(base.shapes[site.tensor])} where the model has {list(source.shapes[site.tensor])}"
                raise ModelError(411, f"{self.config.base.name}: {site.tensor}", f"has shape {shapes}", "give the model that this one was trained from")
        if sites and len(lacking) == len(sites):
            raise ModelError(
                412, self.config.base.name, f"has none of the {len(sites)} weights, {sites[0].tensor} for one", "give the model that this one was trained from"
            )
        return type(self)(self.config, base, frozenset(lacking))

    def open_questions(self) -> list[str]:
        return [f"{self.id}: the base lacks {len(self._lacking)} weights, which get the scales of absmax"] if self._lacking else []

    def scheme(self, site: Site) -> Scheme:
        config = self.config
        if config.format == "nvfp4":
            return fits(site, nvfp4_scheme(False))
        if config.format == "int4":
            return grouped_scheme(site, GroupedConfig.model_validate({"group_size": config.group_size, "symmetric": config.symmetric}))
        if config.granularity == "block":
            return block_scheme((config.block_size, config.block_size))
        return Scheme("fp8 dynamic", Grid(8, "float", "channel", scale_dtype=site.dtype), Grid(8, "float", "token", dynamic=True))

    def fetch(self, sites: Sequence[Site], context: Context) -> Mapping[Site, Tensor]:
        assert self._base
        return {site: self._base.read(site.tensor, site.part) for site in sites if site.name not in self._lacking}

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> Mapping[Site, Quantized | Tensor]:
        return self.apply_with(weights, self.fetch([*weights], context), context)

    def apply_with(self, weights: Mapping[Site, Tensor], fetched: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        import math

        import torch

        from ..numerics.delta import quantize
        from ..numerics.microscale import weight_scale_of

        global_scale = None
        if self.config.format == "nvfp4":
            global_scale = weight_scale_of(torch.stack([w.abs().amax() for w in weights.values()]).amax())
        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            base, search = fetched.get(site), self._search()
            if base is None:
                context.fallbacks.append(f"{site.name}: not in the base model, scales of absmax")
                search = replace(search, metric="joint")  # of a weight that did not change, it takes those
            found = quantize(weight, weight if base is None else base.to(weight.device), scheme.weights, search, global_scale)
            if not math.isfinite(found.totals.learned):
                raise NumericError(410, f"{self.config.base.name}: {site.tensor}", "holds NaN or Inf", "the checkpoint is damaged; fetch it again")
            numbers = {"delta": found.totals.as_dict()} if base is not None else {}
            results[site] = Quantized(scheme, found.codes, found.scale, found.zero_point, global_scale=global_scale, numbers=numbers)
        return results

    def findings(self, linears: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        from ..numerics.delta import summed

        return summed([numbers["delta"] for numbers in linears.values() if "delta" in numbers])

    def _search(self) -> Search:
        from ..numerics.delta import Search

        config = self.config
        lowest, highest = _RANGE[config.format]
        usual: Metric = "joint" if config.format == "fp8" and config.rounding == "nearest" else "mse"
        projection = config.max_projection if config.rounding == "delta" else None
        return Search(config.metric or usual, config.min_range or lowest, config.max_range or highest, config.search == "dense", projection)
