"""Weights rounded to whole codes under learnt scales: what `seq2` and `lsq` share.

Shapes: O out features, I in features, G groups along `in` (one for channels).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from angelslim_core.fake_quant import FakeQuantizer
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..kernels.amax import grouped
from ..kernels.round_levels import ROUND_LEVELS, ROUND_LEVELS_BACK, Levels, codes_of
from ..kernels.round_ternary import least_scale

# strategies of which rows know nothing of each other, so that those of several weights can be rounded as one matrix
BY_ROW = ("channel", "group")


def rows_of(joint: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The rows of each of some weights [O, I] in what was made of all of them together."""
    return joint.split([len(weight) for weight in weights])


class _Stored(torch.autograd.Function):
    """What is learnt as the scale that is stored; straight through bounds and rounding."""

    @staticmethod
    def forward(ctx: Any, learnt: Tensor, unit: Tensor | float, bounds: tuple[float, float], dtype: torch.dtype, factor: float) -> Tensor:
        ctx.slope = unit * factor
        return (learnt.clamp(*bounds) * unit).clamp_(min=least_scale(dtype)).to(dtype).float()

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


def stored(learnt: Tensor, grid: Grid, unit: Tensor | float = 1.0, bounds: tuple[float, float] = (0.0, inf), factor: float = 1.0) -> Tensor:
    """The scale, fp32, as it is stored: learnt * unit, rounded to the dtype of stored scales, above zero.

    Args:
        learnt: fp32.
        unit: without gradient.
        bounds: what is learnt counts as no less, and no more.
        factor: what its gradient is multiplied by beside `unit`.
    """
    return _Stored.apply(learnt, unit, bounds, torch_dtype(grid.scale_dtype), factor)  # type: ignore[no-any-return, no-untyped-call]


class ScaledQuantizer(FakeQuantizer):
    """Codes of evenly spaced levels times scales = learnt * unit.

    The gradient of what is learnt is multiplied by 1 / sqrt(weights under a scale * largest code) (LSQ).

    Args:
        learnt: fp32 [O, G], what training begins with.
        zero_OG: int8 zero points, fixed, or None.
        levels: the codes.
        unit: fp32 [O, G], or a number.
        bounds: of what is learnt.
        largest: the largest code, in the unit of which the definition of a scheme counts.

    Source: Esser et al., "Learned step size quantization" (1902.08153), eq. 3 and section 2.2.
    """

    def __init__(
        self, scheme: Scheme, learnt: Tensor, zero_OG: Tensor | None, levels: Levels, unit: Tensor | float, bounds: tuple[float, float], largest: float
    ) -> None:
        super().__init__(scheme)
        self.learnt = nn.Parameter(learnt.detach().float().clone())
        self.zero: Tensor | None
        self.register_buffer("zero", zero_OG)
        if isinstance(unit, Tensor):
            self.register_buffer("unit", unit)
        else:
            self.unit = unit
        self.levels, self.bounds, self.largest = levels, bounds, largest

    def scales(self, inputs: int) -> Tensor:
        """fp32 [O, G], as they are stored, of a weight with so many inputs."""
        size = inputs // self.learnt.shape[1]
        return stored(self.learnt, self.scheme.weights, self.unit, self.bounds, (size * self.largest) ** -0.5)

    def weight(self, weight_OI: Tensor) -> Tensor:
        zero = None if self.zero is None else self.zero.float()
        found: Tensor = Rounded.apply(weight_OI, self.scales(weight_OI.shape[1]), zero, self.scheme.weights, self.levels)  # type: ignore[no-untyped-call]
        return found

    def joint_key(self, weight_OI: Tensor) -> Hashable:
        if self.scheme.weights.strategy not in BY_ROW:
            return None
        unit = None if isinstance(self.unit, Tensor) else self.unit
        return self.scheme.weights, self.levels, self.bounds, self.largest, unit, self.zero is None, self.learnt.shape[1]

    @classmethod
    def joint_factors(cls, quantizers: Sequence[Any], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
        first, weight_OI = quantizers[0], torch.cat([*weights])
        grid, size = first.scheme.weights, weight_OI.shape[1] // first.learnt.shape[1]
        unit = torch.cat([q.unit for q in quantizers if isinstance(q.unit, Tensor)]) if isinstance(first.unit, Tensor) else first.unit
        scale = stored(torch.cat([q.learnt for q in quantizers]), grid, unit, first.bounds, (size * first.largest) ** -0.5)
        zero = None if first.zero is None else torch.cat([q.zero for q in quantizers if q.zero is not None]).float()
        found: Tensor = Rounded.apply(weight_OI, scale, zero, grid, first.levels)  # type: ignore[no-untyped-call]
        return list(zip(rows_of(found, weights), biases, strict=True))

    @torch.no_grad()
    def quantized(self, weight_OI: Tensor) -> Quantized:
        scale, zero = self.scales(weight_OI.shape[1]), None if self.zero is None else self.zero.float()
        codes = codes_of(weight_OI, scale, zero, self.scheme.weights, self.levels)
        if zero is not None:
            codes += zero[..., None]
        dtype = torch_dtype(self.scheme.weights.scale_dtype)
        return Quantized(self.scheme, codes.to(torch.int8).reshape(weight_OI.shape), scale.to(dtype), self.zero)


@torch.no_grad()
def searched(weight_OI: Tensor, grid: Grid, levels: Levels, unit: float, bounds: tuple[float, float], ratios: Sequence[float]) -> Tensor:
    """Of some parts of the largest magnitude under each scale that of least squared error, the first on a tie, fp32 [O, G].

    Args:
        weight_OI: any float dtype.
        unit, bounds: as of `ScaledQuantizer`.
    """
    weight = weight_OI.float()
    amax = grouped(weight, grid).abs().amax(-1)
    best = chosen = None
    for ratio in ratios:
        tried = (amax * ratio).clamp_(*bounds)
        found = ROUND_LEVELS(weight, stored(tried, grid, unit, bounds), None, grid, levels)
        error = grouped(found.sub_(weight).square_(), grid).sum(-1)
        if best is None or chosen is None:
            best, chosen = error, tried
            continue
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, tried, chosen)
    assert chosen is not None
    return chosen
