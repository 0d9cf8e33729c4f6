"""GPTQ: integer weights in groups, each column's rounding error made up for by the columns after it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import Field

from angelslim_core.device import release_ram
from angelslim_core.passes import LayerPass, PassConfig
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..grouped import GroupedConfig, grouped_scheme
from ..second_moments import second_moments
from ..sinks import SINK_WEIGHT
from ..stages import by_input, rows_of, stages

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer

    from ..numerics.compensate import Moments

# shrinks of a group's range that the scale search tries
SHRINKS = tuple(1 - i / 40 for i in range(1, 17))


class CompensationConfig(PassConfig):
    """Options of GPTQ and its kin that do not say what is stored."""

    damping: float = Field(0.01, gt=0, le=1, description="Part of the Hessian's mean diagonal that is added to it.")
    act_order: bool = Field(True, description="Round inputs of large second moment first; groups stay in place, no g_idx is stored.")
    scale_search: bool = Field(True, description="Shrink each group's range where that lowers its error, weighted by the Hessian's diagonal.")
    sink_weight: float = Field(
        SINK_WEIGHT, ge=0, le=1, description="What errors on a sample's first token, the attention sink, count, in parts of the sample; 0: as any other."
    )
    true_sequential: bool = Field(True, description="Collect inputs anew after each stage of the layer (q k v, o, gate up, down).")


class CompensatedConfig(CompensationConfig, GroupedConfig):
    """Options of GPTQ and its kin with weight-only grids."""


class GPTQ(LayerPass):
    """INT4 weights in groups, error-compensated on calibration data (GPTQ, static groups, act-order without g_idx)."""

    id = "quant.gptq"
    claims = frozenset({"linear.weight"})

    class Config(CompensatedConfig):
        calibrate_all_experts: bool = Field(True, description="Every expert sees every token; else only those routed to it.")

    def scheme(self, site: Site) -> Scheme:
        return grouped_scheme(site, self.config)

    def run(self, layer: Layer) -> dict[str, Any]:
        report = {"hessian_dampings_raised": 0, "experts_rounded_to_nearest": 0}
        with self.on(layer):
            for stage in stages(layer.sites, self.config.true_sequential):
                moments = self.collect(layer, stage)
                for members in by_input(stage):
                    self.solve(layer, members, moments.pop(members[0]), report)
                release_ram()
        return report

    def on(self, layer: Layer) -> AbstractContextManager[None]:
        """Entered before anything of the layer is stored, left when all is; `collect` works inside."""
        return nullcontext()

    def collect(self, layer: Layer, sites: tuple[Site, ...]) -> dict[Site, Moments]:
        """Moments of the input of each set of linears that read one input, by its first member."""
        return second_moments(layer, by_input(sites), self.config.sink_weight, self.config.calibrate_all_experts)

    def solve(self, layer: Layer, members: list[Site], moments: Moments, report: dict[str, int]) -> None:
        """Quantize and store linears that read one input."""
        import torch

        from ..numerics.compensate import compensate
        from ..numerics.integer import quantize, steps

        scheme = self.scheme(members[0])
        grid = scheme.weights
        weight = torch.cat([layer.linear(s).weight.data for s in members])
        if not moments.rows:
            layer.context.fallbacks.append(f"{members[0].name}: no token reached it, rounded to nearest")
            report["experts_rounded_to_nearest"] += 1
            codes, scale, zero = quantize(weight, grid, *self.scales(weight, grid, None))
            before = weight.float()
        else:
            hessian = moments.hessian
            scale, zero = self.scales(weight, grid, hessian.diagonal())
            few = moments.rows < 2 * (grid.group_size or 0)
            levels, before, raised = compensate(
                weight,
                hessian,
                steps(scale, zero, grid),
                grid.group_size,
                damping=self.config.damping * (10 if few else 1),
                act_order=self.config.act_order,
                drift_II=self.drift(moments),
            )
            codes = levels.to(torch.int8)
            report["hessian_dampings_raised"] += raised
        for site, rows in rows_of(members):
            zeros = None if zero is None else zero[rows].contiguous()
            self.finish(layer, site, Quantized(scheme, codes[rows].contiguous(), scale[rows].contiguous(), zeros), before[rows])

    def drift(self, moments: Moments) -> Tensor | None:
        """How far inputs have moved, as `compensate` takes it."""
        return None

    def scales(self, weight_OI: Tensor, grid: Grid, importance_I: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of whatever shares one; `importance_I` weighs squared errors, None if nothing is known of the inputs."""
        from ..numerics.integer import range_of, scale_of, search_range

        if importance_I is not None and self.config.scale_search:
            return search_range(weight_OI, grid, importance_I, SHRINKS)
        return scale_of(*range_of(weight_OI, grid), grid)

    def finish(self, layer: Layer, site: Site, result: Quantized, before_OI: Tensor) -> None:
        """Store one linear; `before_OI` rounds to its codes."""
        layer.store(site, result)
