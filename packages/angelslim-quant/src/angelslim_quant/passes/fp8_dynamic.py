"""FP8 weights and activations: E4M3, scales per output channel, and per token at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from angelslim_core.passes import TensorPass
from angelslim_core.schemes import Grid, Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context


class FP8Dynamic(TensorPass):
    """FP8 (E4M3) weights per output channel (absmax / 448), FP8 activations per token, computed at run time."""

    id = "quant.fp8_dynamic"
    claims = frozenset({"linear.weight", "linear.input"})

    def scheme(self, site: Site) -> Scheme:
        return Scheme("fp8 dynamic", Grid(8, "float", "channel", scale_dtype=site.dtype), Grid(8, "float", "token", dynamic=True))

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        from ..numerics.fp8 import quantize

        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            results[site] = Quantized(scheme, *quantize(weight, scheme.weights))
        return results
