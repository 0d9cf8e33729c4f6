"""NVFP4: FP4 values in blocks of 16, an E4M3 scale a block, an fp32 scale a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from angelslim_core.exporters.modelopt import nvfp4_scheme
from angelslim_core.passes import LayerPass, Pass, PassConfig, TensorPass
from angelslim_core.schemes import Quantized, Scheme

from ..experts import input_ranges
from ..microscaled import fits
from ..sinks import SINK_WEIGHT, fitting, token_weights
from ..stages import by_input, stages

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context
    from angelslim_core.layer import Layer

    from ..numerics.compensate import Moments


class NVFP4Config(PassConfig):
    """Options of NVFP4."""

    weight_only: bool = Field(False, description="Leave activations in 16 bits; without `gptq` this needs no calibration data.")
    gptq: bool = Field(True, description="Make up for each column's rounding error in the columns after it, on calibration data.")
    scale_search: bool = Field(True, description="Take of each block's E4M3 scales near absmax / 6 the one of least error.")
    damping: float = Field(0.01, gt=0, le=1, description="Part of the Hessian's mean diagonal that is added to it.")
    sink_weight: float = Field(
        SINK_WEIGHT, ge=0, le=1, description="What errors on a sample's first token, the attention sink, count, in parts of the sample; 0: as any other."
    )
    calibrate_all_experts: bool = Field(True, description="Every expert sees every token; else only those routed to it.")


class NVFP4(LayerPass):
    """NVFP4 weights and activations: E2M1 in blocks of 16 under searched E4M3 scales and one fp32 scale a tensor.

    Linears that engines run as one matmul (q, k, v; gate, up) share the fp32 scales.
    """

    id = "quant.nvfp4"

    class Config(NVFP4Config):
        pass

    @classmethod
    def bind(cls, config: PassConfig) -> Pass:
        assert isinstance(config, NVFP4Config)
        return cls(config) if config.gptq or not config.weight_only else NVFP4Weights(config)

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        """What this step gives its final form."""
        return frozenset({"linear.weight"}) if self.config.weight_only else frozenset({"linear.weight", "linear.input"})

    def scheme(self, site: Site) -> Scheme:
        return fits(site, nvfp4_scheme(not self.config.weight_only))

    def run(self, layer: Layer) -> dict[str, Any]:
        report = {"hessian_dampings_raised": 0, "experts_rounded_to_nearest": 0, "input_scales_of_siblings": 0}
        for stage in stages(layer.sites, sequential=True):
            moments, input_scales = self._collect(layer, by_input(stage), report)
            for members in by_input(stage):
                self._solve(layer, members, moments[members[0]], input_scales.get(members[0]), report)
        return report

    def _collect(self, layer: Layer, sets: list[list[Site]], report: dict[str, int]) -> tuple[dict[Site, Moments], dict[Site, Tensor]]:
        """Of the input of each set, by its first member: moments as engines see it, and the global scale."""
        import torch

        from angelslim_core.emulation import round_input
        from angelslim_core.rounding import E2M1_MAX, E4M3_MAX

        from ..numerics.compensate import Moments
        from ..numerics.microscale import global_scale_of

        first = [members[0] for members in sets]
        moments = {site: Moments() for site in first}
        grid = self.scheme(first[0]).input_activations
        input_scales: dict[Site, Tensor] = {}
        if grid:
            device = layer.context.device
            amax = {site: torch.zeros((), device=device) for site in first}

            def widen(site: Site, x_NI: Tensor) -> None:
                if x_NI.numel():
                    amax[site] = amax[site].maximum(x_NI.abs().amax())

            layer.observe(widen, self.config.calibrate_all_experts, sites=first)
            found = {site: float(layer.context.group.reduce(seen, "max")) for site, seen in amax.items()}
            ranges, lent = input_ranges(layer, found, E2M1_MAX * E4M3_MAX)
            report["input_scales_of_siblings"] += lent
            input_scales = {site: global_scale_of(torch.tensor(largest, device=device)) for site, largest in ranges.items()}

        for batch in layer.batches:
            weight_N = token_weights(batch, self.config.sink_weight)

            def see(site: Site, x_NI: Tensor, weight_N: Tensor | None = weight_N) -> None:
                moments[site].add(round_input(x_NI, grid, input_scales[site]) if grid else x_NI, None, fitting(weight_N, x_NI))

            layer.observe(see, self.config.calibrate_all_experts, sites=first, batches=[batch])
        for site, seen in moments.items():
            seen.reduce(layer.context.group, site.shape[1], layer.context.device)
        return moments, input_scales

    def _solve(self, layer: Layer, members: list[Site], moments: Moments, input_scale: Tensor | None, report: dict[str, int]) -> None:
        """Quantize and store linears that read one input."""
        import torch

        from ..numerics.compensate import compensate
        from ..numerics.microscale import block_scales, element_steps, quantize, stored_codes, weight_scale_of

        scheme = self.scheme(members[0])
        grid = scheme.weights
        weight = torch.cat([layer.linear(s).weight.data for s in members])
        t = weight_scale_of(weight.abs().amax())
        hessian = moments.hessian if moments.rows else None
        if hessian is not None and moments.rows < 2 * (grid.group_size or 0):
            # a few tokens say nothing of most inputs; those that are 0 in all of them are not dead
            hessian.diagonal().add_(10 * self.config.damping * hessian.diagonal().mean())
        scale = block_scales(weight, grid, t, None if hessian is None else hessian.diagonal(), self.config.scale_search)
        if hessian is None or not self.config.gptq:
            codes = quantize(weight, grid, scale, t)
            if hessian is None:
                layer.context.fallbacks.append(f"{members[0].name}: no token reached it, rounded to nearest")
                report["experts_rounded_to_nearest"] += 1
        else:
            found = compensate(weight, hessian, element_steps(scale, t), grid.group_size, damping=self.config.damping)
            codes = stored_codes(found.levels, grid)
            report["hessian_dampings_raised"] += found.raised
        start = 0
        for site in members:
            rows = slice(start, start + site.shape[0])
            start = rows.stop
            layer.store(site, Quantized(scheme, codes[rows].contiguous(), scale[rows].contiguous(), input_scale=input_scale, global_scale=t))


class NVFP4Weights(TensorPass):
    """NVFP4 weights, data-free: what `NVFP4` is with `weight_only` and without `gptq`."""

    id = NVFP4.id
    claims = frozenset({"linear.weight"})

    @property
    def joins_fused(self) -> bool:
        return True

    def scheme(self, site: Site) -> Scheme:
        return fits(site, nvfp4_scheme(False))

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        import torch

        from ..numerics.microscale import block_scales, quantize, weight_scale_of

        t = weight_scale_of(torch.stack([w.abs().amax() for w in weights.values()]).amax())
        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            scale = block_scales(weight, scheme.weights, t, search=self.config.scale_search)
            results[site] = Quantized(scheme, quantize(weight, scheme.weights, scale, t), scale, global_scale=t)
        return results
