"""Products with INT4 weights in groups, weights read packed: y = x W^T + bias, x in 16 bits or in FP8 with a scale per row.

Shapes: N rows, O out features, I in features, G groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.schemes import Quantized, scale_values

from .available import int4_mma

# a group is half a chunk, or some chunks
GROUPS = (32, 64, 128, 256)
# outputs and inputs of a warp's words
TILE, CHUNK = 16, 64
# from that many rows on the weight is widened for one call and multiplied by cuBLAS (benchmarks/packed_gpu.py --parts tune)
WIDE_ROWS = 65


class Packed4(NamedTuple):
    """INT4 weights in the order in which the threads of a warp hold the left factor of PTX's mma.sync.m16n8k16.

    Args:
        words: int32 [O / 16, I / 64, 32, 4], by thread and step. Thread 4 g + q holds outputs g and g + 8; in step s inputs
            32 (s // 2) + 8 q + 4 (s % 2) + (0 to 3). A nibble m is output g + 8 (m % 2), input 2 (m // 2 % 2) + m // 4 of those,
            code plus 8.
        scale: [O / 16, G, 8, 2] of outputs g and g + 8, in the model's dtype or fp32.
        zero: as `scale`: zero points as numbers, or None.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def outputs(self) -> int:
        """O."""
        return self.words.shape[0] * TILE

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.words.shape[1] * CHUNK // self.scale.shape[1]


def pack4(quantized: Quantized) -> Packed4:
    """Repack codes [O, I], O a multiple of 16, on whatever device they are; half a chunk is filled up by a group of zeros."""
    more = -quantized.codes.shape[1] % CHUNK
    if more:
        scale, zero = (None if t is None else pad(t, (0, 1)) for t in (quantized.scale, quantized.zero_point))
        assert scale is not None
        quantized = replace(quantized, codes=pad(quantized.codes, (0, more)), scale=scale, zero_point=zero)
    codes = quantized.codes.unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 2, 4, 2, 2, 2))
    tiles, chunks = codes.shape[0], codes.shape[3]
    # [tile, 2 outputs, g, chunk, half, q, step of half, 2 pairs, 2 inputs] -> by thread, step, nibble
    nibbles = (codes + 8).permute(0, 3, 2, 5, 4, 6, 8, 7, 1).reshape(tiles, chunks, 32, 4, 8)
    words = torch.zeros(tiles, chunks, 32, 4, dtype=torch.int32, device=codes.device)
    for m in range(8):
        words |= nibbles[..., m].int() << 4 * m
    scale = quantized.scale if quantized.scale.is_floating_point() else scale_values(quantized.scale)
    zero = quantized.zero_point
    return Packed4(words, _by_thread(scale), None if zero is None else _by_thread(zero.to(scale.dtype)))


def _by_thread(values_OG: Tensor) -> Tensor:
    return values_OG.unflatten(0, (-1, 2, 8)).permute(0, 3, 2, 1).contiguous()


class Packed4CPU(NamedTuple):
    """INT4 weights as torch's CPU kernel reads them.

    Args:
        words: uint8, in the order of `_convert_weight_to_int4pack_for_cpu`.
        scale: bf16 [G, O, 2], of a group and what is added to code * scale.
        zero: None.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None = None


def pack4_cpu(quantized: Quantized) -> Packed4CPU:
    """Repack codes [O, I] on the CPU; O is a multiple of 16."""
    scale = scale_values(quantized.scale)
    added = torch.zeros_like(scale) if quantized.zero_point is None else -scale * quantized.zero_point
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.codes.int() + 8, 1)
    return Packed4CPU(words, torch.stack([scale, added], -1).transpose(0, 1).to(torch.bfloat16).contiguous())


def _filled(x_NI: Tensor, weight: Packed4) -> Tensor:
    """The input, filled up as the weight is."""
    more = weight.words.shape[1] * CHUNK - x_NI.shape[1]
    return pad(x_NI.float(), (0, more)).to(x_NI.dtype) if more else x_NI


def unpack4(weight: Packed4, dtype: torch.dtype) -> Tensor:
    """The weight [O, I], rounded to `dtype`; I as `pack4` fills it up."""
    words, group = weight.words, weight.group_size
    nibbles = torch.stack([(words >> 4 * m) & 15 for m in range(8)], -1).unflatten(-1, (2, 2, 2)).unflatten(3, (2, 2)).unflatten(2, (8, 4))
    # [tile, chunk, g, q, half, step of half, 2 inputs, 2 pairs, 2 outputs]
    codes = nibbles.permute(0, 8, 2, 1, 4, 3, 5, 7, 6).reshape(weight.outputs, -1, group).sub_(8).float()
    scale, zero = (None if t is None else t.permute(0, 3, 2, 1).reshape(weight.outputs, -1, 1).float() for t in weight[1:])
    if zero is not None:
        codes -= zero
    return (codes * scale).to(dtype).flatten(1)


def reference(x_NI: Tensor, weight: Packed4, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, O] in `dtype`: widened to fp64, multiplied, rounded once.

    Args:
        x_NI: 16 bits or fp32; FP8 with `x_scale`.
        weight: see `pack4`.
        bias: [O].
        x_scale: [N, 1] fp32, what the rows of `x_NI` are multiplied by.
    """
    y = _filled(x_NI, weight).double() @ unpack4(weight, torch.float64).T
    y = y if x_scale is None else y * x_scale
    return (y if bias is None else y + bias).to(dtype)


def _int4pack(x_NI: Tensor, weight: Packed4CPU, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = x_NI if x_scale is None else (x_NI.float() * x_scale).to(dtype)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.words, x.shape[1] // weight.scale.shape[0], weight.scale)
    return y if bias is None else y + bias


def widened(x_NI: Tensor, weight: Packed4, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight in fp32 for one call, for CPUs without a kernel."""
    y = _filled(x_NI, weight).float() @ unpack4(weight, torch.float32).T
    y = y if x_scale is None else y * x_scale
    return (y if bias is None else y + bias).to(dtype)


def _mma(x_NI: Tensor, weight: Packed4, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    from .triton.int4_matmul import matmul

    if x_NI.shape[0] >= WIDE_ROWS:
        return _widen(x_NI, weight, bias, x_scale, dtype)
    return matmul(_filled(x_NI, weight), weight, bias, x_scale, dtype)


def _widen(x_NI: Tensor, weight: Packed4, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight in 16 bits for one call, multiplied by cuBLAS."""
    from .triton.int4_matmul import widen

    x = _filled(x_NI, weight).to(dtype)
    if x_scale is None:
        return linear(x, widen(weight, dtype), bias)
    y = linear(x, widen(weight, dtype)).float() * x_scale
    return (y if bias is None else y + bias).to(dtype)


def _is_for_cpu(x_NI: Tensor, weight: Any, *_: Any, **__: Any) -> tuple[bool, str]:
    return isinstance(weight, Packed4CPU), "BF16 on a CPU, outputs in multiples of 16"


def _fits(x_NI: Tensor, weight: Any, *_: Any, dtype: torch.dtype = torch.bfloat16, **__: Any) -> tuple[bool, str]:
    ok = x_NI.is_cuda and isinstance(weight, Packed4) and dtype in (torch.bfloat16, torch.float16) and weight.group_size in GROUPS
    return ok, f"16 bits on a GPU, groups of {', '.join(map(str, GROUPS))}"


_IMPLEMENTATIONS = (
    Implementation("mma", _mma, _fits, int4_mma),
    Implementation("widen", _widen, _fits, triton_runs),
    Implementation("int4pack", _int4pack, _is_for_cpu),
    Implementation("torch", widened),
)
W4A16_MATMUL = Kernel("quant.w4a16_matmul", reference, _IMPLEMENTATIONS)
W4A8_MATMUL = Kernel("quant.w4a8_matmul", reference, _IMPLEMENTATIONS)
