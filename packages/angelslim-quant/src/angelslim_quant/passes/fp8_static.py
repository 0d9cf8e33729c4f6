"""FP8 with calibrated activation scales: one scale per weight tensor and one per input, fixed at quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.passes import LayerPass, PassConfig
from angelslim_core.schemes import Grid, Quantized, Scheme

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

    def scheme(self, site: Site) -> Scheme:
        return Scheme("fp8 static", Grid(8, "float", "tensor"), Grid(8, "float", "tensor"))

    def run(self, layer: Layer) -> dict[str, Any]:
        import torch

        from angelslim_core.calibration.observers import OBSERVERS

        from ..numerics.fp8 import E4M3_MAX, quantize, scale_of

        observers = {site: OBSERVERS[self.config.observer]() for site in layer.sites}
        layer.observe(lambda site, x_NI: observers[site].observe(x_NI))
        sets: dict[str, list[Site]] = {}
        for site in layer.sites:
            sets.setdefault(site.fused or site.name, []).append(site)
        for members in sets.values():
            amax = max(float(observers[s].result().max()) for s in members)
            input_scale = torch.tensor([max(amax, FLOOR) / E4M3_MAX], dtype=torch.float32)
            grid = self.scheme(members[0]).weights
            largest: Tensor = torch.stack([layer.linear(s).weight.abs().amax().float() for s in members]).amax().reshape(1)
            for site in members:
                weight = layer.linear(site).weight
                codes, scale = quantize(weight, grid, scale_of(largest, grid))
                layer.store(site, Quantized(self.scheme(site), codes, scale, input_scale=input_scale.to(weight.device)))
        return {"input_scales": sum(len(m) for m in sets.values())}
