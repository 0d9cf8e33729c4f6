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
from ..second_moments import second_moments
from ..sinks import SINK_WEIGHT, observe
from ..stages import by_input, rows_of, stages

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context
    from angelslim_core.layer import Layer


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
        gptq, rounds_inputs = self.config.gptq, not self.config.weight_only
        ranges, squares = self._survey(layer, report) if rounds_inputs or not gptq else ({}, {})
        for stage in stages(layer.sites, sequential=gptq):
            hessians = self._hessians(layer, by_input(stage), ranges) if gptq else {}
            for members in by_input(stage):
                first = members[0]
                hessian = hessians.pop(first, None)
                self._solve(layer, members, hessian, hessian.diagonal() if hessian is not None else squares.get(first), ranges.get(first), report)
        return report

    def _survey(self, layer: Layer, report: dict[str, int]) -> tuple[dict[Site, float], dict[Site, Tensor]]:
        """Of the input of each set of the unquantized layer, by its first member: the largest |x|; sums of squares [I] where a token came."""
        import torch

        from angelslim_core.rounding import E2M1_MAX, E4M3_MAX

        from ..numerics.compensate import check_squares

        group, device = layer.context.group, layer.context.device
        first = [members[0] for members in by_input(layer.sites)]
        amax = {site: torch.zeros((), device=device) for site in first}
        squares = {site: torch.zeros(site.shape[1], device=device) for site in first}
        rows = dict.fromkeys(first, 0)

        def see(site: Site, x_NI: Tensor, weight_N: Tensor | None) -> None:
            if x_NI.numel():
                x = x_NI.float()
                amax[site] = amax[site].maximum(x.abs().amax())
                squares[site] += x.square().sum(0) if weight_N is None else weight_N @ x.square()
                rows[site] += x.shape[0]

        observe(layer, see, self.config.sink_weight, self.config.calibrate_all_experts, sites=first)
        found = {site: float(group.reduce(seen, "max")) for site, seen in amax.items()}
        ranges, lent = input_ranges(layer, found, E2M1_MAX * E4M3_MAX) if not self.config.weight_only else ({}, 0)
        report["input_scales_of_siblings"] += lent
        for sums in squares.values():
            check_squares(sums)
        total = {site: int(group.reduce(torch.tensor(rows[site]))) for site in first}
        return ranges, {site: self._trusted(site, group.reduce(squares[site]), total[site]) for site in first if total[site]}

    def _hessians(self, layer: Layer, sets: list[list[Site]], ranges: dict[Site, float]) -> dict[Site, Tensor]:
        """H of the input of each set as engines see it, by its first member, where a token came; ranges widen to those that are met."""
        import torch

        from angelslim_core.emulation import round_input

        from ..numerics.microscale import global_scale_of

        group, device = layer.context.group, layer.context.device
        first = [members[0] for members in sets]
        grid = self.scheme(first[0]).input_activations
        scales = {site: global_scale_of(torch.tensor(ranges[site], device=device)) for site in first} if grid else {}
        amax = {site: torch.zeros((), device=device) for site in first}

        def stored(site: Site, x_NI: Tensor) -> Tensor:
            if grid and x_NI.numel():
                amax[site] = amax[site].maximum(x_NI.abs().amax())
                return round_input(x_NI, grid, scales[site])
            return x_NI

        moments = second_moments(layer, sets, self.config.sink_weight, self.config.calibrate_all_experts, stored)
        for site in scales:
            ranges[site] = max(ranges[site], float(group.reduce(amax[site], "max")))
        hessians = {site: seen.hessian for site, seen in moments.items() if seen.rows}
        for site, hessian in hessians.items():
            self._trusted(site, hessian.diagonal(), moments[site].rows)
        return hessians

    def _trusted(self, site: Site, squares_I: Tensor, rows: int) -> Tensor:
        """Sums of squares, raised in place where a few tokens say nothing of most inputs: those that are 0 in all of them are not dead."""
        if rows < 2 * (self.scheme(site).weights.group_size or 0):
            squares_I += 10 * self.config.damping * squares_I.mean()
        return squares_I

    def _solve(
        self, layer: Layer, members: list[Site], hessian: Tensor | None, importance_I: Tensor | None, amax: float | None, report: dict[str, int]
    ) -> None:
        """Quantize and store linears that read one input.

        Args:
            importance_I: weight of each input's squared error; None if no token came.
            amax: the largest |x| of the input, if it is rounded.
        """
        import torch

        from ..numerics.compensate import compensate
        from ..numerics.microscale import element_steps, global_scale_of, quantize_nvfp4, stored_codes, weight_scale_of

        scheme = self.scheme(members[0])
        grid = scheme.weights
        weight = torch.cat([layer.linear(s).weight.data for s in members])
        t = weight_scale_of(weight.abs().amax())
        codes, scale = quantize_nvfp4(weight, grid, t, importance_I, self.config.scale_search)
        if hessian is not None:
            found = compensate(weight, hessian, element_steps(scale, t), grid.group_size, damping=self.config.damping)
            codes = stored_codes(found.levels, grid)
            report["hessian_dampings_raised"] += found.raised
        if importance_I is None:
            layer.context.fallbacks.append(f"{members[0].name}: no token reached it, rounded to nearest")
            report["experts_rounded_to_nearest"] += 1
        input_scale = None if amax is None else global_scale_of(torch.tensor(amax, device=weight.device))
        for site, rows in rows_of(members):
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

        from ..numerics.microscale import quantize_nvfp4, weight_scale_of

        t = weight_scale_of(torch.stack([w.abs().amax() for w in weights.values()]).amax())
        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            codes, scale = quantize_nvfp4(weight, scheme.weights, t, search=self.config.scale_search)
            results[site] = Quantized(scheme, codes, scale, global_scale=t)
        return results
