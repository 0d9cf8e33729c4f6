"""Integer weights in groups, rounded to nearest; activations stay as they are (W4A16 and neighbours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from angelslim_core.errors import PlanError
from angelslim_core.passes import PassConfig, TensorPass
from angelslim_core.schemes import Grid, Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context


class INT4RTN(TensorPass):
    """INT4 weights in groups along the inputs, rounded to nearest; activations stay in 16 bits."""

    id = "quant.int4_rtn"
    claims = frozenset({"linear.weight"})

    class Config(PassConfig):
        bits: int = Field(4, ge=2, le=8, description="Bits a weight. Engines have fast kernels for 4 and 8.")
        group_size: int = Field(128, ge=8, description="Inputs that share a scale; must divide the inputs of every linear.")
        symmetric: bool = Field(True, description="Without a zero point.")

    def scheme(self, site: Site) -> Scheme:
        bits, group_size, symmetric = self.config.bits, self.config.group_size, self.config.symmetric
        columns = site.shape[1]
        if columns % group_size:
            fitting = [g for g in (256, 128, 96, 64, 48, 32, 16, 8) if columns % g == 0]
            raise PlanError(
                30, site.name, f"its {columns} inputs are no multiple of group_size {group_size}", f"sizes that divide it: {', '.join(map(str, fitting))}"
            )
        name = f"int{bits} g{group_size} {'sym' if symmetric else 'asym'}"
        return Scheme(name, Grid(bits, "int", "group", group_size, symmetric=symmetric, scale_dtype=site.dtype))

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        from ..numerics.integer import quantize

        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            results[site] = Quantized(scheme, *quantize(weight, scheme.weights))
        return results
