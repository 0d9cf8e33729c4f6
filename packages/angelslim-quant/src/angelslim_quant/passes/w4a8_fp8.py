"""W4A8 with FP8 activations: INT4 weights whose group scales are FP8 numbers times a channel's scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from angelslim_core.passes import Pass, PassConfig, TensorPass
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..grouped import check_group
from .gptq import GPTQ, SHRINKS, CompensationConfig

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context


class W4A8FP8(GPTQ):
    """INT4 weights in groups, error-compensated (GPTQ), scales that FP8 kernels hold exactly; FP8 activations per token."""

    id = "quant.w4a8_fp8"
    claims = frozenset({"linear.weight", "linear.input"})

    class Config(CompensationConfig):
        group_size: int = Field(128, ge=8, description="Inputs that share a scale; must divide the inputs of every linear.")
        method: Literal["gptq", "rtn"] = Field("gptq", description="rtn: round to nearest, which needs no calibration data.")
        calibrate_all_experts: bool = Field(True, description="Every expert sees every token; else only those routed to it.")

    @classmethod
    def bind(cls, config: PassConfig) -> Pass:
        assert isinstance(config, cls.Config)
        return cls(config) if config.method == "gptq" else W4A8FP8Nearest(config)

    def scheme(self, site: Site) -> Scheme:
        return w4a8_fp8_scheme(site, self.config.group_size)

    def scales(self, weight_OI: Tensor, grid: Grid, importance_I: Tensor | None) -> tuple[Tensor, Tensor | None]:
        from ..numerics.two_level import two_level_scales

        return two_level_scales(weight_OI, grid, importance_I, SHRINKS if self.config.scale_search else ()), None


class W4A8FP8Nearest(TensorPass):
    """INT4 weights in groups, rounded to nearest: what `W4A8FP8` is with `method: rtn`."""

    id = W4A8FP8.id
    claims = W4A8FP8.claims

    def scheme(self, site: Site) -> Scheme:
        return w4a8_fp8_scheme(site, self.config.group_size)

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        from ..numerics.integer import quantize
        from ..numerics.two_level import two_level_scales

        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            scale = two_level_scales(weight, scheme.weights, None, SHRINKS if self.config.scale_search else ())
            codes, _, _ = quantize(weight, scheme.weights, scale)
            results[site] = Quantized(scheme, codes, scale)
        return results


def w4a8_fp8_scheme(site: Site, group_size: int) -> Scheme:
    """INT4 in groups, E4M3 per token.

    Raises:
        PlanError: `group_size` does not divide the inputs.
    """
    check_group(site, group_size)
    return Scheme(f"int4 g{group_size} fp8", Grid(4, "int", "group", group_size, scale_dtype=site.dtype), Grid(8, "float", "token", dynamic=True))
