"""Learned step size quantization of a KV cache: keys and values in FP8 (E4M3) under learnt scales.

Shapes: B batch, H key-value heads, T tokens, D channels of a head, S scales: one, or one a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from angelslim_core.errors import NumericError
from angelslim_core.fake_cache import FakeCache
from angelslim_core.kv_cache import round_heads
from angelslim_core.rounding import E4M3_MAX, round_e4m3
from angelslim_core.schemes import Grid

from ..numerics.fp8 import scale_of
from .lsq import UNSEEN
from .scaled import stored

GRID = Grid(8, "float", "tensor")


class RoundedHeads(torch.autograd.Function):
    """`round_heads`, with LSQ's gradients; keeps nothing but what it is given."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, scale_S: Tensor) -> Tensor:
        ctx.save_for_backward(x_BHTD, scale_S)
        return round_heads(x_BHTD, scale_S)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        x_BHTD, scale_S = ctx.saved_tensors
        ratio, slope = x_BHTD.float() / scale_S.view(-1, 1, 1), slopes[0].float()
        inside = ratio.abs() <= E4M3_MAX
        of_scale = (round_e4m3(ratio) - ratio * inside).mul_(slope).sum((0, 2, 3))
        of_scale = of_scale if len(scale_S) > 1 else of_scale.sum(0, keepdim=True)
        return (slope * inside).to(x_BHTD.dtype) if ctx.needs_input_grad[0] else None, of_scale


class LSQCache(FakeCache):
    """x' = code s, code = E4M3(x / s) cut off at 448, of keys after RoPE under one scale (or one a head), of values under another.

    What is learnt is the logarithm of s, since nothing is known of keys and values when training begins: the first batch that it
    is shown in training, the same one in all processes, sets s to the largest magnitude / 448, where `quant.kv_fp8` leaves it.

    Gradients: dx = dy inside the range, else 0; ds = dy (code - x / s) inside, dy code outside, over the square root of how many
    numbers of a token share s times 448.

    Args:
        scales: how many of the keys, and of the values.

    Source: Esser et al., "Learned step size quantization" (1902.08153), eq. 3 and section 2.2.
    """

    def __init__(self, scales: int) -> None:
        super().__init__()
        self.k_log, self.v_log = (nn.Parameter(torch.full((scales,), UNSEEN)) for _ in range(2))
        self._seen = False

    def rounded(self, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        if not self._has_seen(key_BHTD, value_BHTD):
            return key_BHTD, value_BHTD
        return self._rounded(key_BHTD, self.k_log), self._rounded(value_BHTD, self.v_log)

    def scales(self) -> tuple[Tensor, Tensor]:
        if float(self.k_log.min()) <= UNSEEN:
            raise NumericError(1000, "scales of keys and values", "no step was trained, so that nothing is known of them", "train one step or more")
        return stored(self.k_log.exp(), GRID), stored(self.v_log.exp(), GRID)

    def _rounded(self, x_BHTD: Tensor, log_S: Tensor) -> Tensor:
        share = x_BHTD.shape[1] * x_BHTD.shape[3] // len(log_S)
        found: Tensor = RoundedHeads.apply(x_BHTD, stored(log_S.exp(), GRID, factor=(share * E4M3_MAX) ** -0.5))  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def _has_seen(self, key_BHTD: Tensor, value_BHTD: Tensor) -> bool:
        """Whether the scales are known; the first batch that it is shown in training tells them."""
        if not self._seen:
            if self.training and float(self.k_log.min()) <= UNSEEN:
                largest = torch.stack([x.abs().amax((0, 2, 3)).float() for x in (key_BHTD, value_BHTD)])
                largest = largest if len(self.k_log) > 1 else largest.amax(1, keepdim=True)
                for log_S, amax_S in zip((self.k_log, self.v_log), largest, strict=True):
                    log_S.copy_(scale_of(amax_S, GRID).log_())
            self._seen = float(self.k_log.min()) > UNSEEN
        return self._seen
