"""A whole plugin: one pass, its options, and the preset that `--plugins acme` runs."""

from __future__ import annotations

from angelslim_core import PassConfig, TensorPass, hookimpl
from pydantic import Field

ANGELSLIM_HOOKS = 1


class RoundToGrid(TensorPass):
    """Round every linear weight to multiples of `step`."""

    id = "acme.round_to_grid"
    claims = frozenset({"linear.weight"})  # final form: no other pass may claim the same weight

    class Config(PassConfig):
        step: float = Field(1 / 128, gt=0, description="Distance of grid points, in weight units.")

    def apply(self, weights, context):
        return {site: (weight.float() / self.config.step).round().mul(self.config.step).to(weight.dtype) for site, weight in weights.items()}


@hookimpl
def angelslim_register_passes():
    return [RoundToGrid]


@hookimpl
def angelslim_default_steps(device):
    return [{"use": "acme.round_to_grid"}]
