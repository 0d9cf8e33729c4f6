"""Block FP8, the layout DeepSeek published: one scale per block of weights, activations in dynamic groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from angelslim_core.exporters.hf_fp8 import block_scheme
from angelslim_core.passes import PassConfig, TensorPass
from angelslim_core.schemes import Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context


class FP8Block(TensorPass):
    """FP8 (E4M3) weights in square blocks (absmax / 448), fp32 scales; blocks at ragged edges are smaller."""

    id = "quant.fp8_block"
    claims = frozenset({"linear.weight", "linear.input"})

    class Config(PassConfig):
        block_size: int = Field(128, ge=8, le=4096, description="Rows and columns of a block. Engines need it to divide every dimension.")

    def scheme(self, site: Site) -> Scheme:
        return block_scheme((self.config.block_size, self.config.block_size))

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        from ..numerics.fp8 import quantize

        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            results[site] = Quantized(scheme, *quantize(weight, scheme.weights))
        return results
