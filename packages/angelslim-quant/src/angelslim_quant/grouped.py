"""What the integer passes with groups along the inputs share: options and the scheme they make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from angelslim_core.errors import PlanError
from angelslim_core.exporters import group_layouts
from angelslim_core.passes import PassConfig
from angelslim_core.schemes import Grid, Scheme

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Site


class GroupedConfig(PassConfig):
    """Options of integer weights in groups."""

    bits: int = Field(4, ge=2, le=8, description="Bits a weight. Engines have fast kernels for 4 and 8.")
    group_size: int = Field(128, ge=8, description="Inputs that share a scale; must divide the inputs of every linear.")
    symmetric: bool = Field(True, description="Without a zero point.")


def grouped_scheme(site: Site, config: GroupedConfig) -> Scheme:
    """W`bits`A16 in groups.

    Raises:
        PlanError: `group_size` does not divide the inputs; names sizes that do.
    """
    bits, group_size, symmetric = config.bits, config.group_size, config.symmetric
    check_group(site, group_size)
    name = f"int{bits} g{group_size} {'sym' if symmetric else 'asym'}"
    return Scheme(name, Grid(bits, "int", "group", group_size, symmetric=symmetric, scale_dtype=site.scale_dtype or site.dtype), exporters=group_layouts(bits))


def levels_scheme(name: str, site: Site, group_size: int | None, levels: tuple[int, ...], sparsity: tuple[int, int] | None = None) -> Scheme:
    """Weights of few levels in groups, or channels where `group_size` is None; inputs stay as they are.

    The codes are those of INT4, which engines hold; our own layout stores them in fewer bits.

    Raises:
        PlanError: as `grouped_scheme`.
    """
    if group_size is not None:
        check_group(site, group_size)
    grid = Grid(4, "int", "group" if group_size else "channel", group_size, scale_dtype=site.scale_dtype or site.dtype, levels=levels, sparsity=sparsity)
    return Scheme(f"{name} {f'g{group_size}' if group_size else 'channel'}", grid, exporters=group_layouts(4))


def check_group(site: Site, group_size: int) -> None:
    """Raise PlanError unless groups divide a linear's inputs; names sizes that do."""
    columns = site.shape[1]
    if columns % group_size:
        fitting = [g for g in (256, 128, 96, 64, 48, 32, 16, 8) if columns % g == 0]
        raise PlanError(
            30, site.name, f"its {columns} inputs are no multiple of group_size {group_size}", f"sizes that divide it: {', '.join(map(str, fitting))}"
        )
