"""FP4 under learnt scales, the weights frozen.

Shapes: O out features, I in features, G blocks along `in`, S sub-blocks of 8 of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from angelslim_core.emulation import round_input
from angelslim_core.fake_quant import FakeQuantizer
from angelslim_core.rounding import E2M1_MAX, e2m1_codes, round_e2m1
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..kernels.amax import amax_of, grouped
from ..kernels.search_blocks import candidate, first_scale, steps

# weights of a sub-block
SUB = 8
# what a factor of a block's range counts as at least
LEAST = 2.0**-6
# sigmoid of it is what a sub-block is divided by at first
FIRST = 6.0
# the rate of l in parts of that of m: 1e-3 / 5e-3 of NVFP4 (with a global scale), 5e-2 / 2e-2 of MXFP4
RATES = {True: 0.2, False: 2.5}


class _Rounded(torch.autograd.Function):
    """The rounded weight; straight through the rounding of codes and of scales."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, range_OG: Tensor, logit_OS: Tensor, quantizer: FocusQuantizer) -> Tensor:
        ctx.save_for_backward(weight_OI, range_OG, logit_OS)
        ctx.quantizer = quantizer
        values, step, _, _ = quantizer.values(weight_OI, range_OG, logit_OS)
        return values.mul_(step[..., None, None]).to(weight_OI.dtype).reshape(weight_OI.shape)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        weight_OI, range_OG, logit_OS = ctx.saved_tensors
        values, step, ratio, divisor = ctx.quantizer.values(weight_OI, range_OG, logit_OS)
        inside = ratio.abs() <= E2M1_MAX
        slope = slopes[0].unflatten(1, (*step.shape[1:], -1, SUB))
        held = ratio.mul_(inside)
        for_range = values.sub_(held).mul_(slope).sum((2, 3)) * ctx.quantizer.step_slope(weight_OI, range_OG, step)
        # value = step * code(w / (step c)): d value / d c = - step * ratio / c, and d c / d l = c (1 - c)
        for_logit = held.mul_(slope).sum(-1).mul_(step[..., None]).mul_((divisor[..., 0] - 1) * ctx.quantizer.rate).reshape(logit_OS.shape)
        for_weight = (slope * inside / divisor).to(weight_OI.dtype).reshape(weight_OI.shape) if ctx.needs_input_grad[0] else None
        return for_weight, for_range, for_logit, None


class _RoundedInput(torch.autograd.Function):
    """Inputs as engines round them; straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        return round_input(x, grid)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return slopes[0], None


class FocusQuantizer(FakeQuantizer):
    """code = E2M1(w / (s c)), value = code s; s is made of m times the block's largest magnitude, c = sigmoid(l) of each 8 weights.

    m and l are learnt, l as (l - 6) / r, where r is what the paper's rate of l is in parts of that of m: one rate then serves both.
    c is not stored: the codes keep what it did.

    Args:
        scheme: of NVFP4 (blocks of 16, with a global scale) or MXFP4 (blocks of 32, powers of two).
        weight_OI: the weight, which stays.
        global_scale: [1] fp32 of NVFP4, which linears that engines fuse share.

    Source: "FOCUS" (2608.01847).
    """

    trains_weight = False

    def __init__(self, scheme: Scheme, weight_OI: Tensor, global_scale: Tensor | None) -> None:
        super().__init__(scheme)
        grid = scheme.weights
        self.global_scale: Tensor | None
        self.register_buffer("global_scale", global_scale)
        self.range = nn.Parameter(torch.ones(grid.scale_shape((weight_OI.shape[0], weight_OI.shape[1])), device=weight_OI.device))
        self.logit = nn.Parameter(torch.zeros(weight_OI.shape[0], weight_OI.shape[1] // SUB, device=weight_OI.device))
        self.rate = RATES[global_scale is not None]

    def _scale(self, weight_OI: Tensor, range_OG: Tensor) -> Tensor:
        """Block scales [O, G] as they are stored."""
        amax = amax_of(weight_OI, self.scheme.weights)
        start = first_scale(amax * range_OG.clamp(min=LEAST), self.scheme.weights, self.global_scale, "up")
        return candidate(amax, start, 0, self.global_scale is not None)

    def step_slope(self, weight_OI: Tensor, range_OG: Tensor, step_OG: Tensor) -> Tensor:
        """d step / d m, straight through the rounding: to E4M3 of the number, to a power of two of its exponent."""
        amax = amax_of(weight_OI, self.scheme.weights)
        return step_OG / range_OG.clamp(min=LEAST) * (amax > 0) if self.global_scale is None else amax / E2M1_MAX

    def values(self, weight_OI: Tensor, range_OG: Tensor, logit_OS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E2M1 values [O, G, S, 8], what they are multiplied by [O, G], what was rounded [O, G, S, 8], and c [O, G, S, 1]; fp32."""
        step = steps(self._scale(weight_OI, range_OG), self.global_scale)
        weight = grouped(weight_OI, self.scheme.weights).float().unflatten(2, (-1, SUB))
        divisor = (logit_OS * self.rate + FIRST).sigmoid().unflatten(1, (step.shape[1], -1))[..., None]
        ratio = weight / (step[..., None, None] * divisor)
        return round_e2m1(ratio), step, ratio, divisor

    def weight(self, weight_OI: Tensor) -> Tensor:
        found: Tensor = _Rounded.apply(weight_OI, self.range, self.logit, self)  # type: ignore[no-untyped-call]
        return found

    def inputs(self, x: Tensor) -> Tensor:
        grid = self.scheme.input_activations
        return x if grid is None else _RoundedInput.apply(x, grid)  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def quantized(self, weight_OI: Tensor) -> Quantized:
        values = self.values(weight_OI, self.range, self.logit)[0]
        return Quantized(self.scheme, e2m1_codes(values).reshape(weight_OI.shape), self._scale(weight_OI, self.range), global_scale=self.global_scale)
