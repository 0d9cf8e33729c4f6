"""Ternary weights whose dead ones, rounded to zero, work on as a bias that does not depend on the input.

Shapes: O out features, I in features, G groups along `in` (one for channels), g weights of a group.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from angelslim_core.fake_quant import FakeQuantizer
from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid, Quantized, Scheme

from ..kernels.amax import grouped
from .scaled import stored

Threshold = Literal["absmean", "twn"]
# parts of the mean magnitude below which a weight is rounded to zero
PARTS: dict[Threshold, float] = {"absmean": 0.5, "twn": 0.75}


def ternary(weight_OI: Tensor, grid: Grid, threshold: Threshold) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1, fp32 [O, G, g], and scales as they are stored, fp32 [O, G].

    Args:
        weight_OI: any float dtype.
        threshold: "absmean": |w| > mean|w| / 2 is kept, the scale is mean|w|; "twn": |w| > .75 mean|w|, the mean of what is kept.
    """
    weight = grouped(weight_OI, grid).float()
    size = weight.abs()
    mean = size.mean(-1, keepdim=True)
    kept = size > mean * PARTS[threshold]
    if threshold == "twn":
        mean = size.mul_(kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_(min=1)
    return weight.sign().mul_(kept), stored(mean.squeeze(-1), grid)


class _Rounded(torch.autograd.Function):
    """The ternary weight, and rate * sum of a row's dead weights [O], fp32, of which their gradient is rate * bias gradient."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, rate: Tensor, grid: Grid, threshold: Threshold) -> tuple[Tensor, Tensor]:
        codes, scale = ternary(weight_OI, grid, threshold)
        dead = (grouped(weight_OI, grid).float() * (codes == 0)).sum((1, 2))
        ctx.save_for_backward(weight_OI, rate, dead)
        ctx.grid, ctx.threshold = grid, threshold
        ctx.set_materialize_grads(False)
        return codes.mul_(scale[..., None]).to(weight_OI.dtype).reshape(weight_OI.shape), dead * rate

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        slope_OI, slope_O = slopes
        weight_OI, rate, dead_O = ctx.saved_tensors
        if slope_O is None:
            return slope_OI, None, None, None
        if ctx.needs_input_grad[0]:
            dead = (ternary(weight_OI, ctx.grid, ctx.threshold)[0] == 0).reshape(weight_OI.shape)
            pull = (slope_O * rate)[:, None].to(weight_OI.dtype) * dead
            slope_OI = pull if slope_OI is None else slope_OI + pull
        return slope_OI, (slope_O * dead_O).sum().reshape(1), None, None


class TequilaQuantizer(FakeQuantizer):
    """Y = X (s T)^T + b with b_o = rate * sum of the dead weights of row o; dead weights so keep a gradient with a direction.

    Gradients: dw = dy everywhere (straight through), + rate * dL/db_o on dead weights.

    Args:
        threshold: as of `ternary`.
        rate: the paper's lambda; 0: plain ternary, no bias.
        learn_rate: let training move it (the paper's third variant).

    Source: Huang et al., "Tequila: trapping-free ternary quantization" (2509.23809).
    """

    def __init__(self, scheme: Scheme, threshold: Threshold = "absmean", rate: float = 1e-3, learn_rate: bool = False) -> None:
        super().__init__(scheme)
        self.threshold, self.has_bias = threshold, rate > 0
        self.rate: Tensor
        if learn_rate:
            self.rate = nn.Parameter(torch.tensor([rate]))
        else:
            self.register_buffer("rate", torch.tensor([rate]))

    def _both(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _Rounded.apply(weight_OI, self.rate, self.scheme.weights, self.threshold)  # type: ignore[no-untyped-call]
        return found

    def weight(self, weight_OI: Tensor) -> Tensor:
        return self._both(weight_OI)[0]

    def bias(self, weight_OI: Tensor) -> Tensor | None:
        return self._both(weight_OI)[1].to(weight_OI.dtype) if self.has_bias else None

    def product(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        value, extra = self._both(weight_OI)
        if self.has_bias:
            bias_O = extra.to(weight_OI.dtype) if bias_O is None else bias_O + extra.to(bias_O.dtype)
        return nn.functional.linear(self.inputs(x), value, bias_O)

    @torch.no_grad()
    def quantized(self, weight_OI: Tensor) -> Quantized:
        codes, scale = ternary(weight_OI, self.scheme.weights, self.threshold)
        return Quantized(self.scheme, codes.to(torch.int8).reshape(weight_OI.shape), scale.to(torch_dtype(self.scheme.weights.scale_dtype)))
