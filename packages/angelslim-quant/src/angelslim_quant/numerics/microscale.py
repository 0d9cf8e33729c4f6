"""Blocks of FP4 or FP8 values under narrow scales: MX (a power of two a block) and NVFP4 (E4M3 a block, one fp32 a tensor).

Global scales of NVFP4 are powers of two: they and their inverse are exact, so that code * block scale * global scale is
a number of BF16, whichever of them a layout stores and in whatever order an engine multiplies.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from angelslim_core.schemes import Grid

from ..kernels.round_columns import Steps
from ..kernels.search_blocks import SEARCH_BLOCKS, round_to, steps, stored_codes
from .amax import grouped

# E4M3 bytes around absmax / 6 that are tried, nearest first; 8 are a factor of two, so 4 or 5 put absmax on 4 instead of 6
_NEIGHBOURS = (0, 1, -1, 2, -2, 3, 4, 5, 6)


def quantize(weight_OI: Tensor, grid: Grid, scale_OG: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """Codes [O, I] of a weight under stored scales."""
    step = steps(scale_OG, global_scale)
    return stored_codes(round_to(grouped(weight_OI.float(), grid) / step[..., None], grid), grid).reshape(weight_OI.shape)


def weight_scale_of(amax: Tensor) -> Tensor:
    """Global scale [1] of weights: the largest block may put its absmax on 4 instead of 6."""
    return global_scale_of(amax.float() * (6 / 4))


def global_scale_of(amax: Tensor) -> Tensor:
    """The power of two [1] under which block scales absmax / 6 fit into E4M3; 1 where amax is 0."""
    mantissa, exponent = torch.frexp(amax.float().reshape(1))
    # 6 * 448 = 0.65625 * 2^12
    exponent = (exponent - 12 + (mantissa > 0.65625)).clamp(-120, 120)
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(mantissa), exponent), 1.0)


def quantize_nvfp4(weight_OI: Tensor, grid: Grid, global_scale: Tensor, importance_I: Tensor | None = None, search: bool = True) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and E4M3 scales [O, G] of blocks.

    Args:
        importance_I: weight of the squared error of each input, 1 if not given.
        search: take the scale of least error near absmax / 6, else that one.
    """
    return SEARCH_BLOCKS(weight_OI, grid, global_scale, importance_I, _NEIGHBOURS if search else (0,))


def block_scales(weight_OI: Tensor, grid: Grid, global_scale: Tensor, importance_I: Tensor | None = None, search: bool = True) -> Tensor:
    """The scales of `quantize_nvfp4`."""
    return quantize_nvfp4(weight_OI, grid, global_scale, importance_I, search)[1]


def quantize_mx(weight_OI: Tensor, grid: Grid, rounding: Literal["ceil", "ocp", "search"]) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and E8M0 scales [O, G], uint8.

    Args:
        rounding: "ceil": nothing saturates; "ocp": floor(log2 absmax) - floor(log2 largest); "search": of these and
            their neighbours the one of least squared error.
    """
    return SEARCH_BLOCKS(weight_OI, grid, None, None, (0, -1, 1) if rounding == "search" else (0,), "down" if rounding == "ocp" else "up")


def mx_scales(weight_OI: Tensor, grid: Grid, rounding: Literal["ceil", "ocp", "search"]) -> Tensor:
    """The scales of `quantize_mx`."""
    return quantize_mx(weight_OI, grid, rounding)[1]


def element_steps(scale_OG: Tensor, global_scale: Tensor | None) -> Steps:
    """The FP4 values that `quantize` rounds to with the scales given, for `compensate`."""
    return Steps(steps(scale_OG, global_scale).T.contiguous(), None, "e2m1")
