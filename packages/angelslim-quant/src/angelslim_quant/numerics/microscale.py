"""Blocks of FP4 or FP8 values under narrow scales: MX (a power of two a block) and NVFP4 (E4M3 a block, one fp32 a tensor).

Global scales of NVFP4 are powers of two: they and their inverse are exact, so that code * block scale * global scale is
a number of BF16, whichever of them a layout stores and in whatever order an engine multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from angelslim_core.rounding import E2M1_MAX, E4M3_MAX, cast_e4m3, e2m1_codes, e8m0_codes, round_e2m1
from angelslim_core.schemes import Grid, scale_values

from ..kernels.round_columns import Steps
from .amax import amax_of, grouped

# E4M3 bytes around absmax / 6 that are tried, nearest first; 8 are a factor of two, so 4 or 5 put absmax on 4 instead of 6
_NEIGHBOURS = (0, 1, -1, 2, -2, 3, 4, 5, 6)
# positive finite E4M3 bytes: 2^-9 to 448
_LEAST, _MOST = 0x01, 0x7E


def round_to(values: Tensor, grid: Grid) -> Tensor:
    """Element values of a grid nearest to `values`, fp32."""
    return round_e2m1(values) if grid.bits == 4 else cast_e4m3(values).float()


def stored_codes(values: Tensor, grid: Grid) -> Tensor:
    """Element values as the codes that are stored."""
    return e2m1_codes(values) if grid.bits == 4 else cast_e4m3(values)


def quantize(weight_OI: Tensor, grid: Grid, scale_OG: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """Codes [O, I] of a weight under stored scales."""
    step = steps(scale_OG, global_scale)
    return stored_codes(round_to(grouped(weight_OI.float(), grid) / step[..., None], grid), grid).reshape(weight_OI.shape)


def steps(scale_OG: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """What a block's element values are multiplied by, fp32."""
    return scale_values(scale_OG) if global_scale is None else scale_values(scale_OG) * global_scale


def weight_scale_of(amax: Tensor) -> Tensor:
    """Global scale [1] of weights: the largest block may put its absmax on 4 instead of 6."""
    return global_scale_of(amax.float() * (6 / 4))


def global_scale_of(amax: Tensor) -> Tensor:
    """The power of two [1] under which block scales absmax / 6 fit into E4M3; 1 where amax is 0."""
    mantissa, exponent = torch.frexp(amax.float().reshape(1))
    # 6 * 448 = 0.65625 * 2^12
    exponent = (exponent - 12 + (mantissa > 0.65625)).clamp(-120, 120)
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(mantissa), exponent), 1.0)


def block_scales(weight_OI: Tensor, grid: Grid, global_scale: Tensor, importance_I: Tensor | None = None, search: bool = True) -> Tensor:
    """E4M3 scales [O, G] of blocks.

    Args:
        importance_I: weight of the squared error of each input, 1 if not given.
        search: take the scale of least error near absmax / 6, else that one.
    """
    amax = amax_of(weight_OI, grid)
    start = cast_e4m3(amax / E2M1_MAX / global_scale).view(torch.uint8).int()

    def candidate(offset: int) -> Tensor:
        byte = (start + offset).clamp(_LEAST, _MOST).to(torch.uint8).view(torch.float8_e4m3fn)
        return torch.where(amax > 0, byte.float(), 1.0).to(torch.float8_e4m3fn)

    return _least_error(weight_OI, grid, map(candidate, _NEIGHBOURS if search else (0,)), importance_I, global_scale)


def mx_scales(weight_OI: Tensor, grid: Grid, rounding: Literal["ceil", "ocp", "search"]) -> Tensor:
    """E8M0 scales [O, G], uint8.

    Args:
        rounding: "ceil": nothing saturates; "ocp": floor(log2 absmax) - floor(log2 largest); "search": of these and
            their neighbours the one of least squared error.
    """
    amax, largest = amax_of(weight_OI, grid), E2M1_MAX if grid.bits == 4 else E4M3_MAX
    codes = e8m0_codes(amax, largest, "down" if rounding == "ocp" else "up")
    if rounding != "search":
        return codes
    return _least_error(weight_OI, grid, ((codes.int() + offset).clamp(1, 254).to(torch.uint8) for offset in (0, -1, 1)), None, None)


def _least_error(weight_OI: Tensor, grid: Grid, candidates: Iterable[Tensor], importance_I: Tensor | None, global_scale: Tensor | None) -> Tensor:
    """Of several scales [O, G] the one under which each block's squared error is least, the first on a tie."""
    values = grouped(weight_OI.float(), grid)
    weights = None if importance_I is None else importance_I.float().view(-1, values.shape[-1])
    best = chosen = None
    for scale in candidates:
        step = steps(scale, global_scale)[..., None]
        error = round_to(values / step, grid).mul_(step).sub_(values).square_()
        found = (error if weights is None else error.mul_(weights)).sum(-1)
        if best is None or chosen is None:
            best, chosen = found, scale
            continue
        better = found < best
        best = torch.where(better, found, best)
        chosen = torch.where(better, scale.view(torch.uint8), chosen.view(torch.uint8)).view(scale.dtype)
    assert chosen is not None
    return chosen


def element_steps(scale_OG: Tensor, global_scale: Tensor | None) -> Steps:
    """The FP4 values that `quantize` rounds to with the scales given, for `compensate`."""
    return Steps(steps(scale_OG, global_scale).T.contiguous(), None, "e2m1")
