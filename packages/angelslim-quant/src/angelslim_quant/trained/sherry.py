"""3:4-sparse ternary weights, 1.25 bits: of each four the smallest is zero, the others are a sign.

Shapes: O out features, I in features, G groups along `in` (one for channels).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from angelslim_core.fake_quant import FakeQuantizer
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..kernels.round_ternary import ROUND_TERNARY, ROUND_TERNARY_BACK, Rule, codes_of
from .scaled import BY_ROW, rows_of, stored

Pattern = Literal["contiguous", "strided"]
# the four are neighbours, or of 64 neighbours those that are 16 apart (STQ1_0 of llama.cpp's proposal)
RULES: dict[Pattern, Rule] = {"contiguous": Rule(0.0, of_kept=True, apart=1), "strided": Rule(0.0, of_kept=True, apart=16)}
# share of the training in which the residual path opens
OPENS = 0.1


def residual(progress: float) -> float:
    """Part of the unrounded weight's product that is added after a share of the training: 0 to 1 in a tenth of it, then a cosine to 0."""
    if progress < OPENS:
        return progress / OPENS
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - OPENS) / (1 - OPENS))))


class _Rounded(torch.autograd.Function):
    """The rounded weight plus `share` of the unrounded one: as one matrix its product is Arenas' sum of two."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, learnt_OG: Tensor | None, grid: Grid, rule: Rule, share: float) -> Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.grid, ctx.rule, ctx.share = grid, rule, share
        found: Tensor = ROUND_TERNARY(weight_OI, grid, rule, learnt_OG, share, False)[0]
        return found

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (slope,), (weight_OI,) = slopes, ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return slope * (1 + ctx.share) if ctx.share else slope, None, None, None, None
        return (*ROUND_TERNARY_BACK(slope, weight_OI, ctx.grid, ctx.rule, None, ctx.share, True), None, None, None)


class SherryQuantizer(FakeQuantizer):
    """s T with one zero in each four weights; s = sum of kept |w| / (3/4 g). In training Y = X (s T)^T + r X W^T (Arenas).

    r rises from 0 to 1 in the first tenth and falls to 0 by a cosine; in evaluation it is 0. Gradients: dw = dy (1 + r).

    Args:
        weight_OI: what training begins with.
        pattern: key of `RULES`.
        learn_scale: let training move the scales, which begin as the formula says; else they follow the weights.
        arenas: with the residual path.

    Source: Huang et al., "Sherry: hardware-efficient 1.25-bit ternary quantization via fine-grained sparsification" (2601.07892).
    """

    def __init__(self, scheme: Scheme, weight_OI: Tensor, pattern: Pattern = "contiguous", learn_scale: bool = False, arenas: bool = True) -> None:
        super().__init__(scheme)
        self.rule, self.arenas = RULES[pattern], arenas
        with torch.no_grad():
            self.scale = nn.Parameter(codes_of(weight_OI, scheme.weights, self.rule)[1]) if learn_scale else None

    def _learnt(self, inputs: int) -> Tensor | None:
        """The scales that are trained, as they are stored."""
        return None if self.scale is None else stored(self.scale, self.scheme.weights, factor=(inputs / self.scale.shape[1]) ** -0.5)

    def _value(self, weight_OI: Tensor, share: float) -> Tensor:
        found: Tensor = _Rounded.apply(weight_OI, self._learnt(weight_OI.shape[1]), self.scheme.weights, self.rule, share)  # type: ignore[no-untyped-call]
        return found

    def weight(self, weight_OI: Tensor) -> Tensor:
        return self._value(weight_OI, 0.0)

    @property
    def _share(self) -> float:
        return residual(self.progress) if self.training and self.arenas else 0.0

    def factors(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._value(weight_OI, self._share), bias_O

    def joint_key(self, weight_OI: Tensor) -> Hashable:
        if self.scheme.weights.strategy not in BY_ROW:
            return None
        return self.scheme.weights, self.rule, self._share, self.scale is None

    @classmethod
    def joint_factors(cls, quantizers: Sequence[Any], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
        first, weight_OI = quantizers[0], torch.cat([*weights])
        grid, learnt = first.scheme.weights, None
        if first.scale is not None:
            scale = torch.cat([q.scale for q in quantizers if q.scale is not None])
            learnt = stored(scale, grid, factor=(weight_OI.shape[1] / scale.shape[1]) ** -0.5)
        found: Tensor = _Rounded.apply(weight_OI, learnt, grid, first.rule, first._share)  # type: ignore[no-untyped-call]
        return list(zip(rows_of(found, weights), biases, strict=True))

    @torch.no_grad()
    def quantized(self, weight_OI: Tensor) -> Quantized:
        codes, scale, _ = ROUND_TERNARY(weight_OI, self.scheme.weights, self.rule, self._learnt(weight_OI.shape[1]), 0.0, True)
        return Quantized(self.scheme, codes, scale.to(torch_dtype(self.scheme.weights.scale_dtype)))
