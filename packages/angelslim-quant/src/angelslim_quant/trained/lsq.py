"""Learned step size quantization: whole codes under learnt scales, of weights and of inputs.

Shapes: O out features, I in features, G groups along `in` (one for channels).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from angelslim_core.errors import NumericError
from angelslim_core.schemes import Quantized, Scheme

from ..kernels.quantize_groups import range_of, scale_of
from ..kernels.round_levels import Levels
from ..kernels.search_range import SEARCH_RANGE
from .scaled import Rounded, ScaledQuantizer, stored

# parts of a group's range that are tried, besides all of it, for what its scale begins with
SHRINKS = tuple(1 - i / 20 for i in range(1, 13))

# of the factor of a scale
BOUNDS = (0.25, 4.0)
# logarithm of a scale that no batch has told yet
UNSEEN = -100.0


class LSQQuantizer(ScaledQuantizer):
    """w' = (code - zero point) s, code = round(w / s) + zero point cut off at the range; zero points stay.

    What is learnt is the factor f of s = f s_0, from 1 on and between .25 and 4: one rate then fits all linears. Of the scale of
    inputs it is the logarithm, since nothing is known of them when training begins.

    Gradients: dw = dy inside the range, else 0; ds = dy (code - zero point - w / s) inside, dy (code - zero point) outside,
    over the square root of how many weights share s times the largest code.

    Args:
        weight_OI: what training begins with.
        search: begin with scales of least squared error, else with those of the whole range.
        input_log: [1], logarithm of the scale of inputs, `UNSEEN` until the first batch; linears that read one input share the
            parameter. None: inputs are not rounded.

    Source: Esser et al., "Learned step size quantization" (1902.08153).
    """

    trains_weight = False

    def __init__(self, scheme: Scheme, weight_OI: Tensor, search: bool = True, input_log: nn.Parameter | None = None) -> None:
        grid = replace(scheme.weights, scale_dtype="F32")
        half = 1 << (grid.bits - 1)
        with torch.no_grad():
            if search:
                scale, zero = SEARCH_RANGE(weight_OI, grid, torch.ones(weight_OI.shape[1], device=weight_OI.device), SHRINKS)
            else:
                scale, zero = scale_of(*range_of(weight_OI, grid), grid)
        super().__init__(scheme, torch.ones_like(scale), zero, Levels(1, 0, -half, half - 1), scale, BOUNDS, largest=half - 1)
        self.input_log = input_log
        self._seen = False

    def inputs(self, x: Tensor) -> Tensor:
        grid = self.scheme.input_activations
        if self.input_log is None or grid is None or not self._has_seen(x):
            return x
        rows, half = x.reshape(-1, x.shape[-1]), 1 << (grid.bits - 1)
        scale = stored(self.input_log.exp(), grid, factor=(x.shape[-1] * (half - 1)) ** -0.5)
        found: Tensor = Rounded.apply(rows, scale, None, grid, Levels(1, 0, -half, half - 1))  # type: ignore[no-untyped-call]
        return found.view(x.shape)

    @torch.no_grad()
    def _has_seen(self, x: Tensor) -> bool:
        """Whether the scale of inputs is known; the first batch that it is shown in training tells it, the same one in all processes."""
        assert self.input_log is not None and self.scheme.input_activations is not None
        if not self._seen:
            if self.training and float(self.input_log) <= UNSEEN:
                largest = x.abs().amax().float().reshape(1) / ((1 << (self.scheme.input_activations.bits - 1)) - 1)
                self.input_log.copy_(largest.clamp_(min=1e-8).log_())
            self._seen = float(self.input_log) > UNSEEN
        return self._seen

    @torch.no_grad()
    def quantized(self, weight_OI: Tensor) -> Quantized:
        found = super().quantized(weight_OI)
        if self.input_log is None or self.scheme.input_activations is None:
            return found
        if float(self.input_log) <= UNSEEN:
            raise NumericError(950, "scale of inputs", "no step was trained, so that nothing is known of them", "train one step or more")
        return replace(found, input_scale=stored(self.input_log.exp(), self.scheme.input_activations))


class WeightsToo(LSQQuantizer):
    """`LSQQuantizer` whose weights are trained along with the scales."""

    trains_weight = True
