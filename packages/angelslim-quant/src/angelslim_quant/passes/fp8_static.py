"""FP8 with calibrated activation scales: one scale per weight tensor and one per input, fixed at quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.passes import LayerPass, PassConfig
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..experts import input_ranges
from ..second_moments import second_moments
from ..sinks import SINK_WEIGHT
from ..stages import by_input, rows_of, stages

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer

    from ..numerics.compensate import Moments

# smallest input amax that still gives a usable scale, for inputs that calibration never excites
FLOOR = 1e-7


class FP8StaticConfig(PassConfig):
    """Options of static FP8 but for how ranges of inputs are found."""

    gptq: bool = Field(False, description="Make up for each column's rounding error in the columns after it; takes about twice as long.")
    damping: float = Field(0.01, gt=0, le=1, description="With `gptq`, part of the Hessian's mean diagonal that is added to it.")
    sink_weight: float = Field(SINK_WEIGHT, ge=0, le=1, description="With `gptq`, what errors on a sample's first token count, in parts of the sample.")
    calibrate_all_experts: bool = Field(True, description="Every expert sees every token; else only those routed to it.")


class FP8Static(LayerPass):
    """FP8 (E4M3) weights and activations, one scale per tensor, activation scales from calibration.

    Linears that engines run as one matmul (q, k, v; gate, up) share both scales.
    """

    id = "quant.fp8_static"
    claims = frozenset({"linear.weight", "linear.input"})

    class Config(FP8StaticConfig):
        observer: Literal["absmax", "ema", "histogram"] = Field("absmax", description="How the range of an input is found.")

    def scheme(self, site: Site) -> Scheme:
        return Scheme("fp8 static", Grid(8, "float", "tensor"), Grid(8, "float", "tensor"))

    def run(self, layer: Layer) -> dict[str, Any]:
        import torch

        from ..numerics.fp8 import E4M3_MAX

        sets = by_input(layer.sites)
        ranges, report = self.input_ranges(layer, sets)
        scales = {m[0]: torch.tensor([max(ranges[m[0]], FLOOR) / E4M3_MAX], dtype=torch.float32, device=layer.context.device) for m in sets}
        report = {"input_scales": len(layer.sites), **report}
        if self.config.gptq:
            report |= {"hessian_dampings_raised": 0, "experts_rounded_to_nearest": 0}
        for stage in stages(layer.sites, sequential=self.config.gptq):
            moments = self._moments(layer, by_input(stage), scales) if self.config.gptq else {}
            for members in by_input(stage):
                self._solve(layer, members, moments.pop(members[0], None), scales[members[0]], report)
        return report

    def _moments(self, layer: Layer, sets: list[list[Site]], scales: dict[Site, Tensor]) -> dict[Site, Moments]:
        """Of the rounded inputs."""
        from angelslim_core.emulation import round_input

        grid = self.scheme(sets[0][0]).input_activations
        assert grid
        return second_moments(layer, sets, self.config.sink_weight, self.config.calibrate_all_experts, lambda site, x_NI: round_input(x_NI, grid, scales[site]))

    def _solve(self, layer: Layer, members: list[Site], moments: Moments | None, input_scale: Tensor, report: dict[str, Any]) -> None:
        """Quantize and store linears that read one input."""
        import torch

        from ..numerics.compensate import compensate
        from ..numerics.fp8 import element_steps, quantize, scale_of

        scheme = self.scheme(members[0])
        weight = torch.cat([layer.linear(s).weight.data for s in members])
        scale = scale_of(weight.abs().amax().float().reshape(1), scheme.weights)
        if moments is not None and moments.rows:
            found = compensate(weight, moments.hessian, element_steps(scale, weight.shape[0]), None, damping=self.config.damping)
            codes = found.levels.to(torch.float8_e4m3fn)
            report["hessian_dampings_raised"] += found.raised
        else:
            codes = quantize(weight, scheme.weights, scale)[0]
            if moments is not None:
                layer.context.fallbacks.append(f"{members[0].name}: no token reached it, rounded to nearest")
                report["experts_rounded_to_nearest"] += 1
        for site, rows in rows_of(members):
            layer.store(site, Quantized(scheme, codes[rows].contiguous(), scale, input_scale=input_scale))

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
