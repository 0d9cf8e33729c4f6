"""Linears whose weights have at most four levels, in 2 bits a weight or in 5 bits for four of them.

Shapes: N rows, O out features, I in features, G groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from angelslim_core.kernels import triton_runs
from angelslim_core.schemes import Grid, Quantized, Scheme, scale_values

from .kernels.int4_matmul import Packed4CPU, pack4_cpu
from .kernels.lowbit_matmul import GROUPS, INPUTS, LOWBIT_MATMUL, TILE, PackedLow, group, level_codes, levels, pack_low
from .packed import _HALVES, _ROWS, _all, _pays_on_cpu, _Rows


class LowBitLinear(_Rows):
    """Weights of three or four levels in equal steps, with a scale of a group of inputs or of an output; inputs in 16 bits.

    A CPU in BF16 keeps 4 bits a weight, which torch's INT4 kernel reads; all else 2 bits, or 5 for four weights.
    """

    name = "2 bits"
    words: Tensor

    @classmethod
    def supports(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[bool, str]:
        weights = scheme.weights
        steps = {b - a for a, b in zip(levels(weights), levels(weights)[1:], strict=False)} if weights.levels or weights.bits <= 2 else set()
        if weights.type != "int" or len(steps) != 1 or len(levels(weights)) > 4 or not weights.symmetric or weights.scale_dtype not in ("F32", "BF16", "F16"):
            return False, "weights of at most four levels in equal steps"
        if weights.strategy not in ("group", "channel", "tensor") or group(weights) not in GROUPS or shape[1] % (group(weights) or 1):
            return False, f"scales of outputs, or of groups of {', '.join(map(str, GROUPS[1:]))}"
        if scheme.input_activations is not None:
            return False, "inputs in 16 bits"
        if shape[0] % TILE or shape[1] % INPUTS:
            return False, f"outputs and inputs in multiples of {TILE}"
        return (True, "") if device == "cpu" else _all(triton_runs(), (dtype in _HALVES, "16 bits"))

    @classmethod
    def pays(cls, scheme: Scheme, dtype: torch.dtype, device: str) -> bool:
        return device != "cpu" or _pays_on_cpu(dtype)

    def pack(self, quantized: Quantized) -> None:
        on_cpu = quantized.codes.device.type == "cpu" and self.dtype == torch.bfloat16
        weight = _four_bits(quantized) if on_cpu else pack_low(quantized)
        self._inputs(quantized)
        example = torch.zeros(_ROWS, self.in_features, dtype=self.dtype, device=quantized.codes.device)
        chosen = LOWBIT_MATMUL.choose(example, weight, self.bias, dtype=self.dtype)
        self._multiply = chosen.function
        self.keep("words", weight.words, rows=0)
        self.keep("weight_scale", weight.scale, rows=1 if isinstance(weight, Packed4CPU) else 0)
        self._numbers = (weight.zero, weight.inputs, weight.group) if isinstance(weight, PackedLow) else None
        self.unit = 64 if self._numbers is None else TILE  # rows that are interleaved
        bits = "2 in 4" if self._numbers is None else "1.25" if isinstance(weight, PackedLow) and weight.sparse else "2"
        self.name = f"{bits} bits on {chosen.name}"

    def multiply(self, prepared: Any) -> Tensor:
        x, _ = prepared
        scale = self.weight_scale.contiguous()  # but for scales [G, O, 2] of one of joined linears it is
        weight = Packed4CPU(self.words, scale) if self._numbers is None else PackedLow(self.words, scale, *self._numbers)
        y: Tensor = self._multiply(x, weight, self.bias, dtype=self.dtype)
        return y

    def _kind(self) -> tuple[Any, ...]:
        return *super()._kind(), self._numbers


def _four_bits(quantized: Quantized) -> Packed4CPU:
    """As INT4 in groups, for torch's kernel on CPUs; a scale of an output stands in for those of its groups."""
    level_codes(quantized)  # codes are checked
    grid, (outputs, inputs) = quantized.scheme.weights, quantized.codes.shape
    size = group(grid) or next(g for g in reversed(GROUPS) if inputs % g == 0)
    scale = scale_values(quantized.scale)
    scale = scale if group(grid) else scale.reshape(-1, 1).expand(outputs, inputs // size)
    scheme = Scheme(quantized.scheme.name, Grid(4, "int", "group", size, scale_dtype="BF16"))
    return pack4_cpu(replace(quantized, scheme=scheme, scale=scale.contiguous()))
