"""Integer weights in groups, rounded to nearest; activations stay as they are (W4A16 and neighbours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from angelslim_core.passes import TensorPass
from angelslim_core.schemes import Quantized, Scheme

from ..grouped import GroupedConfig, grouped_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context


class INT4RTN(TensorPass):
    """INT4 weights in groups along the inputs, rounded to nearest; activations stay in 16 bits."""

    id = "quant.int4_rtn"
    claims = frozenset({"linear.weight"})

    class Config(GroupedConfig):
        pass

    def scheme(self, site: Site) -> Scheme:
        return grouped_scheme(site, self.config)

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        from ..numerics.integer import quantize

        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            results[site] = Quantized(scheme, *quantize(weight, scheme.weights))
        return results
