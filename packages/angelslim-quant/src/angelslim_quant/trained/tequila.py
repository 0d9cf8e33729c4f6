"""Ternary weights whose dead ones, rounded to zero, work on as a bias that does not depend on the input.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from angelslim_core.fake_quant import FakeQuantizer
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..kernels.round_ternary import ROUND_TERNARY, ROUND_TERNARY_BACK, Rule
from .scaled import BY_ROW, rows_of

Threshold = Literal["absmean", "twn"]
RULES: dict[Threshold, Rule] = {"absmean": Rule(0.5, of_kept=False), "twn": Rule(0.75, of_kept=True)}


class _Rounded(torch.autograd.Function):
    """The ternary weight, and rate * sum of a row's dead weights [O], fp32, of which their gradient is rate * bias gradient."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, rate: Tensor, grid: Grid, rule: Rule) -> tuple[Tensor, Tensor]:
        value, _, dead = ROUND_TERNARY(weight_OI, grid, rule, None, 0.0, False)
        dead_O = dead.sum(1)
        ctx.save_for_backward(weight_OI, rate, dead_O)
        ctx.grid, ctx.rule = grid, rule
        ctx.set_materialize_grads(False)
        return value, dead_O * rate

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        slope_OI, slope_O = slopes
        weight_OI, rate, dead_O = ctx.saved_tensors
        if slope_O is None:
            return slope_OI, None, None, None
        if slope_OI is None:
            slope_OI = torch.zeros_like(weight_OI)
        found = ROUND_TERNARY_BACK(slope_OI, weight_OI, ctx.grid, ctx.rule, slope_O * rate, 0.0, False)[0] if ctx.needs_input_grad[0] else None
        return found, (slope_O * dead_O).sum().reshape(1) if ctx.needs_input_grad[1] else None, None, None


def _with(bias_O: Tensor | None, extra_O: Tensor) -> Tensor:
    return extra_O if bias_O is None else bias_O + extra_O.to(bias_O.dtype)


class TequilaQuantizer(FakeQuantizer):
    """Y = X (s T)^T + b with b_o = rate * sum of the dead weights of row o; dead weights so keep a gradient with a direction.

    Gradients: dw = dy everywhere (straight through), + rate * dL/db_o on dead weights.

    Args:
        threshold: "absmean": |w| > mean|w| / 2 of the group is kept, the scale is mean|w|; "twn": |w| > .75 mean|w|, the mean of what is kept.
        rate: the paper's lambda; 0: plain ternary, no bias.
        learn_rate: let training move it (the paper's third variant).

    Source: Huang et al., "Tequila: trapping-free ternary quantization" (2509.23809).
    """

    def __init__(self, scheme: Scheme, threshold: Threshold = "absmean", rate: float = 1e-3, learn_rate: bool = False) -> None:
        super().__init__(scheme)
        self.rule, self.has_bias, self._first_rate = RULES[threshold], rate > 0, rate
        self.rate: Tensor
        if learn_rate:
            self.rate = nn.Parameter(torch.tensor([rate]))
        else:
            self.register_buffer("rate", torch.tensor([rate]))

    def _both(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _Rounded.apply(weight_OI, self.rate, self.scheme.weights, self.rule)  # type: ignore[no-untyped-call]
        return found

    def weight(self, weight_OI: Tensor) -> Tensor:
        return self._both(weight_OI)[0]

    def bias(self, weight_OI: Tensor) -> Tensor | None:
        return self._both(weight_OI)[1].to(weight_OI.dtype) if self.has_bias else None

    def factors(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        value, extra = self._both(weight_OI)
        return value, _with(bias_O, extra.to(weight_OI.dtype)) if self.has_bias else bias_O

    def joint_key(self, weight_OI: Tensor) -> Hashable:
        if self.scheme.weights.strategy not in BY_ROW or isinstance(self.rate, nn.Parameter):
            return None
        return self.scheme.weights, self.rule, self.has_bias, self._first_rate

    @classmethod
    def joint_factors(cls, quantizers: Sequence[Any], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
        first = quantizers[0]
        value, extra = first._both(torch.cat([*weights]))
        values = rows_of(value, weights)
        if not first.has_bias:
            return list(zip(values, biases, strict=True))
        extras = rows_of(extra.to(value.dtype), weights)
        return [(part, _with(bias, own)) for part, own, bias in zip(values, extras, biases, strict=True)]

    @torch.no_grad()
    def quantized(self, weight_OI: Tensor) -> Quantized:
        codes, scale, _ = ROUND_TERNARY(weight_OI, self.scheme.weights, self.rule, None, 0.0, True)
        return Quantized(self.scheme, codes, scale.to(torch_dtype(self.scheme.weights.scale_dtype)))
