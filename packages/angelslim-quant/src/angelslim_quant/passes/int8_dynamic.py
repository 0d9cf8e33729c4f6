"""INT8 weights and activations (W8A8): scales per output channel, and per token at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from angelslim_core.passes import TensorPass
from angelslim_core.schemes import Grid, Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context


class INT8Dynamic(TensorPass):
    """INT8 weights per output channel (both ends of its range kept), INT8 activations per token, computed at run time."""

    id = "quant.int8_dynamic"
    claims = frozenset({"linear.weight", "linear.input"})

    def scheme(self, site: Site) -> Scheme:
        return Scheme("int8 dynamic", Grid(8, "int", "channel", scale_dtype=site.dtype), Grid(8, "int", "token", dynamic=True))

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        from ..numerics.integer import quantize

        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            codes, scale, _ = quantize(weight, scheme.weights)
            results[site] = Quantized(scheme, codes, scale)
        return results
