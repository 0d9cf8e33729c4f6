"""3:4-sparse ternary weights, 1.25 bits: of each four the smallest is zero, the others are a sign.

Shapes: O out features, I in features, G groups along `in` (one for channels), g weights of a group.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from angelslim_core.fake_quant import FakeQuantizer
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Quantized, Scheme

from ..kernels.amax import grouped
from .scaled import stored

Pattern = Literal["contiguous", "strided"]
# of a row: how it is cut so that the four weights of which one is zero lie along the axis before the last
FOURS: dict[Pattern, tuple[int, int]] = {"contiguous": (4, 1), "strided": (4, 16)}
# share of the training in which the residual path opens
OPENS = 0.1


def signs(weight_OI: Tensor, pattern: Pattern) -> Tensor:
    """Codes -1, 0, 1, fp32 [O, I]: of each four weights just one is 0, the smallest, the first on a tie.

    Args:
        weight_OI: any float dtype.
        pattern: the four are neighbours, or of 64 neighbours those that are 16 apart (STQ1_0 of llama.cpp's proposal).
    """
    fours = weight_OI.unflatten(1, (-1, *FOURS[pattern]))
    smallest = fours.abs().argmin(2, keepdim=True)
    lanes = torch.arange(4, device=weight_OI.device)[:, None]
    found = torch.where(fours < 0, -1.0, 1.0).masked_fill_(lanes == smallest, 0)
    return found.reshape(weight_OI.shape)


def residual(progress: float) -> float:
    """Part of the unrounded weight's product that is added after a share of the training: 0 to 1 in a tenth of it, then a cosine to 0."""
    if progress < OPENS:
        return progress / OPENS
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - OPENS) / (1 - OPENS))))


class _Rounded(torch.autograd.Function):
    """The rounded weight plus `share` of the unrounded one: as one matrix its product is Arenas' sum of two."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, learnt_OG: Tensor | None, quantizer: SherryQuantizer, share: float) -> Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.quantizer, ctx.share = quantizer, share
        codes, scale_OG = quantizer.codes(weight_OI, learnt_OG)
        found = grouped(codes, quantizer.scheme.weights).mul_(scale_OG[..., None]).reshape(weight_OI.shape)
        return (found.add_(weight_OI, alpha=share) if share else found).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (slope,), (weight_OI,), scale_slope = slopes, ctx.saved_tensors, None
        if ctx.needs_input_grad[1]:
            grid = ctx.quantizer.scheme.weights
            scale_slope = grouped(signs(weight_OI, ctx.quantizer.pattern).mul_(slope), grid).sum(-1)
        return slope * (1 + ctx.share) if ctx.share else slope, scale_slope, None, None


class SherryQuantizer(FakeQuantizer):
    """s T with one zero in each four weights; s = sum of kept |w| / (3/4 g). In training Y = X (s T)^T + r X W^T (Arenas).

    r rises from 0 to 1 in the first tenth and falls to 0 by a cosine; in evaluation it is 0. Gradients: dw = dy (1 + r).

    Args:
        weight_OI: what training begins with.
        pattern: as of `signs`.
        learn_scale: let training move the scales, which begin as the formula says; else they follow the weights.
        arenas: with the residual path.

    Source: Huang et al., "Sherry: hardware-efficient 1.25-bit ternary quantization via fine-grained sparsification" (2601.07892).
    """

    def __init__(self, scheme: Scheme, weight_OI: Tensor, pattern: Pattern = "contiguous", learn_scale: bool = False, arenas: bool = True) -> None:
        super().__init__(scheme)
        self.pattern, self.arenas = pattern, arenas
        self.scale = nn.Parameter(self._mean(signs(weight_OI, pattern), weight_OI)) if learn_scale else None

    @torch.no_grad()
    def _mean(self, codes_OI: Tensor, weight_OI: Tensor) -> Tensor:
        """Mean magnitude of what is kept, fp32 [O, G]."""
        kept = grouped(codes_OI * weight_OI, self.scheme.weights)
        return kept.sum(-1) / (0.75 * kept.shape[-1])

    @torch.no_grad()
    def codes(self, weight_OI: Tensor, learnt_OG: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes, fp32 [O, I], and scales as they are stored, fp32 [O, G].

        Args:
            learnt_OG: `stored` scales, None: they follow the weights.
        """
        codes = signs(weight_OI, self.pattern)
        return codes, stored(self._mean(codes, weight_OI), self.scheme.weights) if learnt_OG is None else learnt_OG

    def _learnt(self, inputs: int) -> Tensor | None:
        """The scales that are trained, as they are stored."""
        return None if self.scale is None else stored(self.scale, self.scheme.weights, factor=(inputs / self.scale.shape[1]) ** -0.5)

    def _value(self, weight_OI: Tensor, share: float) -> Tensor:
        found: Tensor = _Rounded.apply(weight_OI, self._learnt(weight_OI.shape[1]), self, share)  # type: ignore[no-untyped-call]
        return found

    def weight(self, weight_OI: Tensor) -> Tensor:
        return self._value(weight_OI, 0.0)

    def product(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        share = residual(self.progress) if self.training and self.arenas else 0.0
        return nn.functional.linear(self.inputs(x), self._value(weight_OI, share), bias_O)

    @torch.no_grad()
    def quantized(self, weight_OI: Tensor) -> Quantized:
        codes, scale = self.codes(weight_OI, self._learnt(weight_OI.shape[1]))
        return Quantized(self.scheme, codes.to(torch.int8), scale.to(torch_dtype(self.scheme.weights.scale_dtype)))
