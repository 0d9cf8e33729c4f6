"""FP8 with calibrated activation scales: one scale per weight tensor and one per input, fixed at quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.passes import LayerPass, PassConfig
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..experts import input_ranges
from ..stages import by_input

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer

# smallest input amax that still gives a usable scale, for inputs that calibration never excites
FLOOR = 1e-7


class FP8Static(LayerPass):
    """FP8 (E4M3) weights and activations, one scale per tensor, activation scales from calibration.

    Linears that engines run as one matmul (q, k, v; gate, up) share both scales.
    """

    id = "quant.fp8_static"
    claims = frozenset({"linear.weight", "linear.input"})

    class Config(PassConfig):
        observer: Literal["absmax", "ema", "histogram"] = Field("absmax", description="How the range of an input is found.")
        calibrate_all_experts: bool = Field(True, description="Every expert sees every token; else only those routed to it.")

    def scheme(self, site: Site) -> Scheme:
        return Scheme("fp8 static", Grid(8, "float", "tensor"), Grid(8, "float", "tensor"))

    def run(self, layer: Layer) -> dict[str, Any]:
        import torch

        from ..numerics.fp8 import E4M3_MAX, quantize, scale_of

        sets = by_input(layer.sites)
        ranges, report = self.input_ranges(layer, sets)
        for members in sets:
            input_scale = torch.tensor([max(ranges[members[0]], FLOOR) / E4M3_MAX], dtype=torch.float32)
            grid = self.scheme(members[0]).weights
            largest: Tensor = torch.stack([layer.linear(s).weight.abs().amax().float() for s in members]).amax().reshape(1)
            for site in members:
                weight = layer.linear(site).weight
                codes, scale = quantize(weight, grid, scale_of(largest, grid))
                layer.store(site, Quantized(self.scheme(site), codes, scale, input_scale=input_scale.to(weight.device)))
        return {"input_scales": len(layer.sites), **report}

    def input_ranges(self, layer: Layer, sets: Sequence[Sequence[Site]]) -> tuple[dict[Site, float], dict[str, Any]]:
        """What FP8 must reach of the input of each set, by its first member; and numbers for the report."""
        from angelslim_core.calibration.observers import OBSERVERS

        from ..numerics.fp8 import E4M3_MAX

        observers = {site: OBSERVERS[self.config.observer]() for site in layer.sites}
        layer.observe(lambda site, x_NI: observers[site].observe(x_NI), self.config.calibrate_all_experts)
        for site, observer in observers.items():
            observer.reduce(layer.context.group, site.shape[1])
        amax = {site: float(observer.result().max()) for site, observer in observers.items() if observer.rows}
        largest = {members[0]: max(amax.get(s, 0.0) for s in members) for members in sets}
        found, lent = input_ranges(layer, largest, E4M3_MAX)
        return found, {"input_scales_of_siblings": lent}
