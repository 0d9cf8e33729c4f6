"""Linears that round their inputs as engines do, where the engine's kernels are not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ModelError
from .rounding import E2M1_MAX, E4M3_MAX, cast_e4m3, e8m0_codes, round_e2m1
from .schemes import Grid, scale_values

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


def round_input(x: Tensor, grid: Grid, scale: Tensor | None = None) -> Tensor:
    """What an engine multiplies instead of `x`: rounded to `grid` and back, in the dtype of `x`.

    Args:
        x: [..., I].
        grid: how inputs are quantized.
        scale: [1] fp32, the calibrated scale of strategies "tensor" and "tensor_group", None if computed here.
    """
    import torch

    values = x.float()
    if grid.group_size:
        values = torch.nn.functional.pad(values, (0, -x.shape[-1] % grid.group_size)).unflatten(-1, (-1, grid.group_size))
    largest = _largest(grid)
    if grid.strategy == "tensor":
        step = scale if scale is not None else values.abs().amax() / largest
    else:
        amax = values.abs().amax(-1, keepdim=True)
        if grid.scale_dtype == "U8":
            step = scale_values(e8m0_codes(amax, largest, "even"))
        elif grid.strategy == "tensor_group":
            assert scale is not None
            step = cast_e4m3(amax / largest / scale).float() * scale
        else:
            step = amax / largest
    ratio = torch.where(step > 0, values / step, 0)
    if grid.type == "int":
        codes = ratio.round_().clamp_(-largest - 1, largest)
    else:
        codes = round_e2m1(ratio) if grid.bits == 4 else cast_e4m3(ratio).float()
    return (codes * step).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].to(x.dtype)


def round_inputs(linear: nn.Module, grid: Grid, scale: Tensor | None = None) -> RemovableHandle:
    """From now on a linear rounds its inputs; see `round_input`."""
    return linear.register_forward_pre_hook(lambda _, args: (round_input(args[0], grid, scale if scale is None else scale.to(args[0].device)), *args[1:]))


def check_emulable(module: str, grid: Grid, scale: Tensor | None) -> None:
    """Raise ModelError if the inputs of a module cannot be rounded as its checkpoint asks."""
    known = grid.symmetric and grid.strategy in ("tensor", "token", "group", "tensor_group") and (grid.type == "int" or grid.bits in (4, 8))
    if not known or (scale is None and (grid.dynamic is False or grid.strategy == "tensor_group")):
        raise ModelError(260, module, f"quantizes its inputs in a way that is not known here: {grid}")


def _largest(grid: Grid) -> float:
    if grid.type == "int":
        return float((1 << (grid.bits - 1)) - 1)
    return E2M1_MAX if grid.bits == 4 else E4M3_MAX
