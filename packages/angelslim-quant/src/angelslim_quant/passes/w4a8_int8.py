"""W4A8 with INT8 activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from angelslim_core.schemes import Grid, Scheme

from ..grouped import check_group
from .gptq import GPTQ, CompensationConfig

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Site


class W4A8Int8(GPTQ):
    """INT4 weights in groups or per output channel, error-compensated (GPTQ); INT8 activations per token, computed at run time."""

    id = "quant.w4a8_int8"
    claims = frozenset({"linear.weight", "linear.input"})

    class Config(CompensationConfig):
        group_size: int | None = Field(128, ge=8, description="Inputs that share a scale; must divide the inputs of every linear. null: one scale a channel.")
        calibrate_all_experts: bool = Field(True, description="Every expert sees every token; else only those routed to it.")

    def scheme(self, site: Site) -> Scheme:
        group_size = self.config.group_size
        if group_size:
            check_group(site, group_size)
        name = f"int4 {f'g{group_size}' if group_size else 'channel'} int8"
        return Scheme(name, Grid(4, "int", "group" if group_size else "channel", group_size, scale_dtype=site.dtype), Grid(8, "int", "token", dynamic=True))
