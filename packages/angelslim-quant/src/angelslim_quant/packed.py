"""Linears that run FP8, INT8 and INT4 as stored, each on the kernel that fits the machine.

Shapes: N rows, O out features, I in features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from angelslim_core.kernels import triton_runs
from angelslim_core.packed import PackedLinear
from angelslim_core.products import slow_on_cpu
from angelslim_core.schemes import Grid, Quantized, Scheme, scale_values

from .kernels.available import fp8_tensor_cores
from .kernels.gated_rows import GATED_ROWS
from .kernels.int4_matmul import GROUPS, TILE, W4A8_MATMUL, W4A16_MATMUL, Packed4CPU, pack4, pack4_cpu
from .kernels.normed_rows import NORMED_ROWS
from .kernels.quantize_rows import QUANTIZE_ROWS
from .kernels.scaled_matmul import BLOCK, FP8_MATMUL, INT8_MATMUL

_HALVES = (torch.bfloat16, torch.float16)
# rows of the input that kernels are chosen with; none of them depends on it otherwise
_ROWS = 32


class _Rows(PackedLinear):
    """Multiplies codes of inputs and their scales, or the inputs themselves and None."""

    inputs: Grid | None
    input_scale: Tensor | None
    weight_scale: Tensor

    def _inputs(self, quantized: Quantized) -> tuple[Tensor, Tensor | None]:
        """Sets how inputs are quantized, chooses the kernels that do it, and returns an example of their output."""
        self.inputs = grid = quantized.scheme.input_activations
        scale = quantized.input_scale if grid and grid.strategy == "tensor" else None
        self.keep("input_scale", None if scale is None else scale.float().reshape(1))
        example = torch.zeros(_ROWS, self.in_features, dtype=self.dtype, device=quantized.codes.device)
        self._gate = GATED_ROWS.choose(example.new_empty(0, 2 * self.in_features), "silu", grid, self.input_scale).function
        self._norm = NORMED_ROWS.choose(example, example[0], 0.0, "weight", grid, self.input_scale).function
        if grid is None:
            return example, None
        self.prepares = (grid.bits, grid.type, grid.strategy, grid.group_size, None if scale is None else float(scale))
        self._quantize = QUANTIZE_ROWS.choose(example, grid, self.input_scale).function
        found: tuple[Tensor, Tensor] = self._quantize(example, grid, self.input_scale)
        return found

    def prepare(self, x: Tensor) -> Any:
        rows = x.reshape(-1, self.in_features).contiguous()  # torch's kernels on CPUs take no others
        return (rows, None) if self.inputs is None else self._quantize(rows, self.inputs, self.input_scale)

    def prepare_gated(self, x_N2I: Tensor, activation: str) -> Any:
        return self._gate(x_N2I, activation, self.inputs, self.input_scale)

    def prepare_normed(self, x_NI: Tensor, weight_I: Tensor, eps: float, norm: str) -> tuple[Tensor, Any]:
        y_NI, *prepared = self._norm(x_NI, weight_I, eps, norm, self.inputs, self.input_scale)
        return y_NI, tuple(prepared)


class _EightBits(_Rows):
    """Codes of 8 bits on both sides."""

    codes: Tensor
    unit = 1

    def pack(self, quantized: Quantized) -> None:
        grid = quantized.scheme.weights
        scale = scale_values(quantized.scale)
        if grid.strategy == "block":
            scale, self.unit = torch.nn.functional.pad(scale, (0, -scale.shape[1] % 4)), BLOCK
        elif scale.numel() > 1 or (quantized.scheme.input_activations or grid).strategy != "tensor":
            scale = scale.reshape(-1, 1).expand(self.out_features, 1)  # row-wise on one side is row-wise on both
        else:
            scale = scale.reshape(1)
        self.keep("codes", quantized.codes.contiguous(), rows=0)
        self.keep("weight_scale", scale.contiguous(), rows=None if scale.dim() == 1 else 0)
        codes, x_scale = self._inputs(quantized)
        kernel = INT8_MATMUL if grid.type == "int" else FP8_MATMUL
        chosen = kernel.choose(codes, x_scale, self.codes, self.weight_scale, self.bias, dtype=self.dtype)
        self._multiply = chosen.function
        self.name = f"{'INT8' if grid.type == 'int' else 'FP8'} on {chosen.name}"

    def multiply(self, prepared: Any) -> Tensor:
        codes, scale = prepared
        y: Tensor = self._multiply(codes, scale, self.codes, self.weight_scale, self.bias, dtype=self.dtype)
        return y


class FP8Linear(_EightBits):
    """FP8 weights per channel or tensor with inputs per token or of one scale, or in blocks of 128 x 128 with inputs in groups of 128."""

    name = "FP8"

    @classmethod
    def supports(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[bool, str]:
        weights, inputs = scheme.weights, scheme.input_activations
        if not _is(weights, 8, "float") or inputs is None or not _is(inputs, 8, "float"):
            return False, "FP8 weights and inputs"
        rows = weights.strategy in ("channel", "tensor") and (
            (inputs.strategy == "token" and inputs.dynamic is True) or (inputs.strategy == "tensor" and inputs.dynamic is False)
        )
        blocks = weights.block_structure == (BLOCK, BLOCK) and inputs.strategy == "group" and inputs.group_size == BLOCK and inputs.dynamic is True
        if not rows and not blocks:
            return False, "scales of rows, of tensors, or of blocks of 128"
        if device == "cpu":
            return True, ""
        return _all(fp8_tensor_cores(), (dtype in _HALVES and shape[1] % 16 == 0, "16 bits, inputs in multiples of 16"))

    @classmethod
    def pays(cls, scheme: Scheme, dtype: torch.dtype, device: str) -> bool:
        return device != "cpu"  # a CPU widens FP8 slower than it reads BF16


class INT8Linear(_EightBits):
    """INT8 weights per channel or tensor, inputs per token."""

    name = "INT8"

    @classmethod
    def supports(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[bool, str]:
        weights, inputs = scheme.weights, scheme.input_activations
        if not _is(weights, 8, "int") or weights.strategy not in ("channel", "tensor"):
            return False, "INT8 weights per channel or tensor"
        if inputs is None or not _is(inputs, 8, "int") or inputs.strategy != "token" or inputs.dynamic is not True:
            return False, "INT8 inputs per token"
        if device == "cpu":
            return True, ""
        return _all(triton_runs(), (dtype in _HALVES and shape[1] % 16 == 0, "16 bits, inputs in multiples of 16"))

    @classmethod
    def pays(cls, scheme: Scheme, dtype: torch.dtype, device: str) -> bool:
        return device != "cpu" or _pays_on_cpu(dtype)


class INT4Linear(_Rows):
    """INT4 weights in groups, with or without zero points; inputs in 16 bits, or FP8 per token."""

    name = "INT4"
    words: Tensor
    zero: Tensor | None

    @classmethod
    def supports(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[bool, str]:
        weights, inputs = scheme.weights, scheme.input_activations
        group = weights.group_size
        if (weights.bits, weights.type, weights.strategy) != (4, "int", "group") or group not in GROUPS or shape[1] % group:
            return False, f"INT4 weights in groups of {', '.join(map(str, GROUPS))}"
        if inputs is not None and not (_is(inputs, 8, "float") and inputs.strategy == "token" and inputs.dynamic is True):
            return False, "inputs in 16 bits, or FP8 per token"
        if shape[0] % TILE:
            return False, f"outputs in multiples of {TILE}"
        if device == "cpu":
            return True, ""
        cores = fp8_tensor_cores() if inputs is not None else (True, "")
        return _all(triton_runs(), cores, (dtype in _HALVES, "16 bits"))

    @classmethod
    def pays(cls, scheme: Scheme, dtype: torch.dtype, device: str) -> bool:
        return device != "cpu" or _pays_on_cpu(dtype)

    def pack(self, quantized: Quantized) -> None:
        device = quantized.codes.device
        weight = pack4_cpu(quantized) if device.type == "cpu" and self.dtype == torch.bfloat16 else pack4(quantized)
        self._form = type(weight)
        x, x_scale = self._inputs(quantized)
        kernel = W4A16_MATMUL if x_scale is None else W4A8_MATMUL
        chosen = kernel.choose(x, weight, self.bias, x_scale, dtype=self.dtype)
        self._multiply = chosen.function
        for name, tensor in zip(("words", "weight_scale", "zero"), weight, strict=True):
            self.keep(name, tensor, rows=1 if name == "weight_scale" and self._form is Packed4CPU else 0)
        self.unit = 64 if self._form is Packed4CPU else TILE  # rows that are interleaved
        self.name = f"INT4 on {chosen.name}"

    def multiply(self, prepared: Any) -> Tensor:
        x, scale = prepared
        # contiguous but for scales [G, O, 2] of one of joined linears
        y: Tensor = self._multiply(x, self._form(self.words, self.weight_scale.contiguous(), self.zero), self.bias, scale, dtype=self.dtype)
        return y


def _is(grid: Grid, bits: int, kind: str) -> bool:
    return grid.bits == bits and grid.type == kind and grid.symmetric and grid.scale_dtype in ("F32", "BF16", "F16")


def _pays_on_cpu(dtype: torch.dtype) -> bool:
    """Measured where a CPU has no instructions for BF16: benchmarks/packed_linear.py."""
    return dtype == torch.bfloat16 and dtype in slow_on_cpu()


def _all(*checks: tuple[bool, str]) -> tuple[bool, str]:
    return next((c for c in checks if not c[0]), (True, ""))
