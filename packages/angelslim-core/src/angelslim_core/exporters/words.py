"""What GPTQ and AWQ share: unsigned codes in int32 words, an F16 scale and a zero point a group, groups along the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, PlanError
from ..schemes import Grid, Scheme
from . import group_layouts

if TYPE_CHECKING:
    from torch import Tensor

WHERE = "config.json: quantization_config"


def check_held(layout: str, bits: Sequence[int], shape: tuple[int, int], scheme: Scheme) -> int:
    """Codes a word, if `layout` holds this scheme and shape.

    Raises:
        PlanError: it does not; says why.
    """
    grid = scheme.weights
    if grid.type != "int" or grid.bits not in bits or grid.strategy not in ("group", "channel") or scheme.input_activations is not None:
        wanted = " or ".join(map(str, bits))
        raise PlanError(220, layout, f"holds weight-only integers of {wanted} bits in groups, not {scheme.name}")
    if grid.scale_dtype != "F16":
        raise PlanError(221, layout, f"stores scales in F16, {scheme.name} has them in {grid.scale_dtype}", "ask for the layout by export.format")
    per_word = 32 // grid.bits
    if shape[0] % per_word or shape[1] % per_word:
        raise PlanError(222, layout, f"packs {per_word} codes a word, which does not divide {shape[0]} x {shape[1]}")
    return per_word


def single_grid(layout: str, schemes: Mapping[str, Scheme]) -> Grid:
    """The grid of all modules; the config of these layouts names one."""
    grids = {scheme.weights for scheme in schemes.values()}
    if len(grids) != 1:
        raise PlanError(223, layout, f"holds one integer grid a folder, not {len(grids)}", "export.format compressed-tensors holds several")
    (grid,) = grids
    return grid


def read_grid(config: Mapping[str, Any], allowed: Sequence[int], bits: Any, group_size: Any, symmetric: bool) -> Scheme:
    """Scheme of a config's values (hostile input)."""
    if type(bits) is not int or bits not in allowed or type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise ModelError(220, WHERE, f"bits {bits!r:.50} and group_size {group_size!r:.50} are not known to this reader")
    strategy, size = ("channel", None) if group_size == -1 else ("group", group_size)
    name = f"int{bits} {f'g{size}' if size else 'channel'} {'sym' if symmetric else 'asym'}"
    grid = Grid(bits, "int", strategy, size, symmetric=symmetric, scale_dtype="F16")  # type: ignore[arg-type]
    return Scheme(name, grid, exporters=group_layouts(bits))


def check_parts(scheme: Scheme, shape: tuple[int, int], scales_GO: Tensor, qzeros_GW: Tensor | None) -> None:
    """Scales and zero points must have the shapes that the codes ask for.

    Raises:
        ModelError: they do not.
    """
    grid, (rows, columns) = scheme.weights, shape
    wanted = grid.scale_shape(shape) if columns % (grid.group_size or 1) == 0 else None
    if wanted is None or tuple(scales_GO.shape) != wanted[::-1]:
        raise ModelError(221, "scales", f"have shape {list(scales_GO.shape)}, which does not fit {rows} x {columns} in {scheme.name}")
    if qzeros_GW is not None and tuple(qzeros_GW.shape) != (wanted[1], rows * grid.bits // 32):
        raise ModelError(222, "qzeros", f"have shape {list(qzeros_GW.shape)}, which does not fit {rows} x {columns} in {scheme.name}")


def shifted(codes: Tensor, by: int, bits: int) -> Tensor:
    """int8 codes plus `by`, wrapped around in `bits` bits."""
    import torch

    half = 1 << (bits - 1)
    return (((codes.int() + half + by) & ((1 << bits) - 1)) - half).to(torch.int8)
