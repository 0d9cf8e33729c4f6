"""Rounding of a trained weight to -1, 0, 1 times a scale that follows it, and its way back.

Shapes: O out features, I in features, G groups along `in` (one for channels), g weights of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.schemes import Grid

from .amax import grouped
from .quantize_groups import LARGEST_GROUP


class Rule(NamedTuple):
    """Which weights are kept.

    Args:
        part: those above this part of the group's mean magnitude; without `apart`.
        of_kept: the scale is the mean magnitude of what is kept, else of all.
        apart: of each four weights this far apart all but the smallest, the first on a tie; 0: by `part`.
    """

    part: float
    of_kept: bool
    apart: int = 0


def least_scale(dtype: torch.dtype) -> float:
    """A stored scale is no less: above zero in F16 too."""
    return 2.0**-24 if dtype == torch.float16 else 1e-8


def codes_of(weight_OI: Tensor, grid: Grid, rule: Rule) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1, fp32 [O, G, g], and scales, fp32 [O, G], before they are rounded to what is stored."""
    groups = grouped(weight_OI, grid).float()
    size = groups.abs()
    mean = size.mean(-1)
    if rule.apart:
        fours = weight_OI.unflatten(1, (-1, 4, rule.apart)).abs()
        lanes = torch.arange(4, device=weight_OI.device)[:, None]
        kept = (lanes != fours.argmin(2, keepdim=True)).reshape(groups.shape)
    else:
        kept = size > mean[..., None] * rule.part
    codes = torch.where(groups < 0, -1.0, 1.0).mul_(kept)
    return codes, size.mul_(kept).sum(-1) / kept.sum(-1).clamp_(min=1) if rule.of_kept else mean


def reference(weight_OI: Tensor, grid: Grid, rule: Rule, scale_OG: Tensor | None, share: float, as_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded weight, its scales, and sums of the weights that are rounded to zero.

    Args:
        weight_OI: any float dtype.
        scale_OG: fp32, as stored; None: as the rule says, rounded to `grid.scale_dtype`.
        share: part of the unrounded weight that is added.
        as_codes: codes (int8) instead of code * scale + share * weight.

    Returns:
        [O, I] in the dtype of the weight, or int8; fp32 [O, G]; fp32 [O, G].
    """
    codes, scale = codes_of(weight_OI, grid, rule)
    if scale_OG is None:
        dtype = torch_dtype(grid.scale_dtype)
        scale_OG = scale.clamp_(min=least_scale(dtype)).to(dtype).float()
    dead = (grouped(weight_OI, grid).float() * (codes == 0)).sum(-1)
    if as_codes:
        return codes.to(torch.int8).reshape(weight_OI.shape), scale_OG, dead
    values = codes.mul_(scale_OG[..., None]).reshape(weight_OI.shape)
    return (values.add_(weight_OI, alpha=share) if share else values).to(weight_OI.dtype), scale_OG, dead


def reference_back(
    slope_OI: Tensor, weight_OI: Tensor, grid: Grid, rule: Rule, pull_O: Tensor | None, share: float, with_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight [O, I], in its dtype, straight through the rounding, and of scales [O, G] that were given, fp32.

    Args:
        slope_OI: gradient of the rounded weight.
        pull_O: fp32, what weights that are rounded to zero get besides; None: nothing.
        share: as it was.
        with_scale: whether the scales' is wanted, else it is None.
    """
    codes, _ = codes_of(weight_OI, grid, rule)
    slope = slope_OI.float()
    found = slope * (1 + share)
    if pull_O is not None:
        found += pull_O[:, None] * (codes == 0).reshape(weight_OI.shape)
    return found.to(weight_OI.dtype), codes.mul_(grouped(slope, grid)).sum(-1) if with_scale else None


def _triton(weight_OI: Tensor, grid: Grid, rule: Rule, scale_OG: Tensor | None, share: float, as_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    from .triton.round_ternary import round_ternary

    return round_ternary(weight_OI, grid, rule, scale_OG, share, as_codes)


def _triton_back(
    slope_OI: Tensor, weight_OI: Tensor, grid: Grid, rule: Rule, pull_O: Tensor | None, share: float, with_scale: bool
) -> tuple[Tensor, Tensor | None]:
    from .triton.round_ternary import round_ternary_back

    return round_ternary_back(slope_OI, weight_OI, grid, rule, pull_O, share, with_scale)


def _on_gpu(weight_OI: Tensor, grid: Grid, *_: object) -> tuple[bool, str]:
    held = (grid.group_size or weight_OI.shape[1]) <= LARGEST_GROUP
    return weight_OI.is_cuda and held, f"groups or channels of at most {LARGEST_GROUP} weights on a GPU"


def _back_on_gpu(slope_OI: Tensor, weight_OI: Tensor, grid: Grid, *_: object) -> tuple[bool, str]:
    return _on_gpu(weight_OI, grid)


ROUND_TERNARY = Kernel("quant.round_ternary", reference, (Implementation("triton", _triton, _on_gpu, triton_runs), Implementation("torch", reference)))
ROUND_TERNARY_BACK = Kernel(
    "quant.round_ternary_back", reference_back, (Implementation("triton", _triton_back, _back_on_gpu, triton_runs), Implementation("torch", reference_back))
)
