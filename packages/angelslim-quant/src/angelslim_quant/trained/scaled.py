"""Weights rounded to whole codes under learnt scales: what `seq2` and `lsq` share.

Shapes: O out features, I in features, G groups along `in` (one for channels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from angelslim_core.fake_quant import FakeQuantizer
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..kernels.amax import grouped
from ..kernels.round_levels import ROUND_LEVELS, ROUND_LEVELS_BACK, Levels, codes_of


class _Stored(torch.autograd.Function):
    """What is learnt as the scale that is stored; straight through floor and rounding."""

    @staticmethod
    def forward(ctx: Any, learnt: Tensor, unit: float, least: float, dtype: torch.dtype, factor: float) -> Tensor:
        ctx.slope = unit * factor
        return (learnt * unit).clamp_(min=least).to(dtype).float()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return slopes[0] * ctx.slope, None, None, None, None


class Rounded(torch.autograd.Function):
    """`ROUND_LEVELS` and its way back; keeps nothing but what it is given."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid, levels: Levels) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_OG, zero_OG)
        ctx.grid, ctx.levels = grid, levels
        found: Tensor = ROUND_LEVELS(weight_OI, scale_OG, zero_OG, grid, levels)
        return found

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return (*ROUND_LEVELS_BACK(slopes[0], *ctx.saved_tensors, ctx.grid, ctx.levels, ctx.needs_input_grad[0]), None, None, None)


def stored(learnt: Tensor, grid: Grid, unit: float = 1.0, least: float = 1e-8, factor: float = 1.0) -> Tensor:
    """The scale, fp32, as it is stored: learnt * unit, rounded to the dtype of stored scales, never below `least` or the dtype's smallest number.

    Args:
        learnt: fp32.
        factor: what its gradient is multiplied by beside `unit`.
    """
    dtype = torch_dtype(grid.scale_dtype)
    if dtype == torch.float16:
        least = max(least, 2.0**-24)
    return _Stored.apply(learnt, unit, least, dtype, factor)  # type: ignore[no-any-return, no-untyped-call]


class ScaledQuantizer(FakeQuantizer):
    """Codes of evenly spaced levels times learnt scales.

    Args:
        learnt: fp32 [O, G], what the scales begin with.
        zero_OG: int8 zero points, fixed, or None.
        levels: the codes.
        unit: times what is learnt it is the scale.
        least: what is learnt counts as no less.
        most: the largest code of `levels` times `unit`, of which the gradient's factor 1 / sqrt(weights under a scale * most) is made (LSQ).

    Source: Esser et al., "Learned step size quantization" (1902.08153), eq. 3 and section 2.2.
    """

    def __init__(
        self, scheme: Scheme, learnt: Tensor, zero_OG: Tensor | None, levels: Levels, *, unit: float = 1.0, least: float = 1e-8, most: float = 1.0
    ) -> None:
        super().__init__(scheme)
        self.scale = nn.Parameter(learnt.detach().float().clone())
        self.zero: Tensor | None
        self.register_buffer("zero", zero_OG)
        self.levels, self.unit, self.least, self.most = levels, unit, least, most

    def scales(self, inputs: int) -> Tensor:
        """fp32 [O, G], as they are stored, of a weight with so many inputs."""
        size = inputs // self.scale.shape[1]
        return stored(self.scale, self.scheme.weights, self.unit, self.least * self.unit, (size * self.most) ** -0.5)

    def weight(self, weight_OI: Tensor) -> Tensor:
        zero = None if self.zero is None else self.zero.float()
        found: Tensor = Rounded.apply(weight_OI, self.scales(weight_OI.shape[1]), zero, self.scheme.weights, self.levels)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def quantized(self, weight_OI: Tensor) -> Quantized:
        scale, zero = self.scales(weight_OI.shape[1]), None if self.zero is None else self.zero.float()
        codes = codes_of(weight_OI, scale, zero, self.scheme.weights, self.levels)
        if zero is not None:
            codes += zero[..., None]
        dtype = torch_dtype(self.scheme.weights.scale_dtype)
        return Quantized(self.scheme, codes.to(torch.int8).reshape(weight_OI.shape), scale.to(dtype), self.zero)


@torch.no_grad()
def searched(weight_OI: Tensor, grid: Grid, levels: Levels, unit: float, least: float, ratios: Sequence[float]) -> Tensor:
    """Of some parts of the largest magnitude under each scale that of least squared error, the first on a tie, fp32 [O, G].

    Args:
        weight_OI: any float dtype.
        unit, least: as of `ScaledQuantizer`.
    """
    weight = weight_OI.float()
    amax = grouped(weight, grid).abs().amax(-1)
    best = chosen = None
    for ratio in ratios:
        tried = (amax * ratio).clamp_(min=least)
        found = ROUND_LEVELS(weight, stored(tried, grid, unit, least * unit), None, grid, levels)
        error = grouped(found.sub_(weight).square_(), grid).sum(-1)
        if best is None or chosen is None:
            best, chosen = error, tried
            continue
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, tried, chosen)
    assert chosen is not None
    return chosen
