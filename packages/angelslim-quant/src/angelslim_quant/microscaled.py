"""What the passes with blocks of FP4 or FP8 values share: options, the MX scheme, the check of shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from angelslim_core.errors import PlanError
from angelslim_core.passes import PassConfig, TensorPass
from angelslim_core.schemes import Grid, Quantized, Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context


class MXConfig(PassConfig):
    """Options of MX formats."""

    scale: Literal["ceil", "ocp", "search"] = Field(
        "ceil", description="Power of two of a block: ceil saturates nothing; ocp may, at the top; search takes the one of least error."
    )
    weight_only: bool = Field(False, description="Leave activations in 16 bits.")


def fits(site: Site, scheme: Scheme) -> Scheme:
    """The scheme, if its blocks divide a linear's inputs.

    Raises:
        PlanError: they do not.
    """
    size = scheme.weights.group_size
    assert size
    if site.shape[1] % size:
        raise PlanError(265, site.name, f"its {site.shape[1]} inputs are no multiple of {size}, the block of {scheme.name}", "add it to `ignore`")
    return scheme


def mx_scheme(bits: int, weight_only: bool) -> Scheme:
    """MXFP4 or MXFP8."""
    grid = Grid(bits, "float", "group", 32, scale_dtype="U8")
    return Scheme(f"mxfp{bits}a16", grid) if weight_only else Scheme(f"mxfp{bits}", grid, replace(grid, dynamic=True))


class MXPass(TensorPass):
    """Blocks of 32 under a power of two; inputs likewise, their scales computed at run time.

    Attributes:
        bits: of an element.
    """

    bits: int

    class Config(MXConfig):
        pass

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        """What this step gives its final form."""
        return frozenset({"linear.weight"}) if self.config.weight_only else frozenset({"linear.weight", "linear.input"})

    def scheme(self, site: Site) -> Scheme:
        return fits(site, mx_scheme(self.bits, self.config.weight_only))

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> dict[Site, Quantized | Tensor]:
        from .numerics.microscale import quantize_mx

        results: dict[Site, Quantized | Tensor] = {}
        for site, weight in weights.items():
            scheme = self.scheme(site)
            results[site] = Quantized(scheme, *quantize_mx(weight, scheme.weights, self.config.scale))
        return results
