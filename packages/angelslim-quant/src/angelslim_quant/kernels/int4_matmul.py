"""Products with INT4 weights in groups, weights read packed: y = x W^T + bias, x in 16 bits or in FP8 with a scale per row.

Shapes: N rows, O out features, I in features, G groups, W = I / 8 words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel
from angelslim_core.schemes import Quantized, scale_values

from .available import triton_runs

# group sizes whose words fit the tiles of the kernels
GROUPS = (32, 64, 128, 256)
# rows up to which the weight is read once a row by the vector kernel
VECTOR_ROWS = 2
# from that many rows on, or with fewer outputs than fill the GPU with tiles, the weight is widened for one call and multiplied
# by cuBLAS (H100, benchmarks/packed_gpu.py --parts tune)
WIDE_ROWS, FEW_OUTPUTS = 128, 8192


class Packed4(NamedTuple):
    """INT4 weights as the kernels read them.

    Args:
        words: int32 [O, W]; in each group of S inputs word t holds, from bit 4 j on, the code of input j S / 8 + t, plus 8:
            a thread that reads neighbouring words needs neighbouring inputs.
        scale: [O, G] in the model's dtype or fp32.
        zero: [O, G] zero points as numbers of the scale's dtype, or None.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.words.shape[1] * 8 // self.scale.shape[1]


def pack4(quantized: Quantized) -> Packed4:
    """Repack codes [O, I], on whatever device they are."""
    group = quantized.scheme.weights.group_size
    assert group
    rows, columns = quantized.codes.shape
    nibbles = (quantized.codes + 8).view(rows, columns // group, 8, group // 8)
    words = torch.zeros(rows, columns // group, group // 8, dtype=torch.int32, device=quantized.codes.device)
    for j in range(8):
        words |= nibbles[:, :, j].int() << 4 * j
    scale = quantized.scale if quantized.scale.is_floating_point() else scale_values(quantized.scale)
    return Packed4(words.flatten(1), scale.contiguous(), None if quantized.zero_point is None else quantized.zero_point.to(scale.dtype).contiguous())


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


def unpack4(weight: Packed4, dtype: torch.dtype) -> Tensor:
    """The weight [O, I], rounded to `dtype`."""
    rows, groups = weight.scale.shape
    words = weight.words.view(rows, groups, 1, -1)
    shifts = torch.arange(0, 32, 4, device=words.device).view(1, 1, 8, 1)
    codes = ((words >> shifts) & 15).sub_(8).flatten(2).float()
    if weight.zero is not None:
        codes -= weight.zero.float()[..., None]
    return (codes * weight.scale.float()[..., None]).to(dtype).flatten(1)


def reference(x_NI: Tensor, weight: Packed4, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, O] in `dtype`: widened to fp64, multiplied, rounded once.

    Args:
        x_NI: 16 bits or fp32; FP8 with `x_scale`.
        weight: see `pack4`.
        bias: [O].
        x_scale: [N, 1] fp32, what the rows of `x_NI` are multiplied by.
    """
    y = x_NI.double() @ unpack4(weight, torch.float64).T
    y = y if x_scale is None else y * x_scale
    return (y if bias is None else y + bias).to(dtype)


def _int4pack(x_NI: Tensor, weight: Packed4CPU, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = x_NI if x_scale is None else (x_NI.float() * x_scale).to(dtype)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.words, x.shape[1] // weight.scale.shape[0], weight.scale)
    return y if bias is None else y + bias


def widened(x_NI: Tensor, weight: Packed4, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight in fp32 for one call, for CPUs without a kernel."""
    y = x_NI.float() @ unpack4(weight, torch.float32).T
    y = y if x_scale is None else y * x_scale
    return (y if bias is None else y + bias).to(dtype)


def _triton(x_NI: Tensor, weight: Packed4, bias: Tensor | None = None, x_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    from .triton.int4_matmul import matmul, vector, widen

    rows = x_NI.shape[0]
    if rows <= VECTOR_ROWS:
        return vector(x_NI, weight, bias, x_scale, dtype)
    if rows < WIDE_ROWS and weight.words.shape[0] >= FEW_OUTPUTS:
        return matmul(x_NI, weight, bias, x_scale, dtype)
    if x_scale is None:
        return torch.nn.functional.linear(x_NI, widen(weight, dtype), bias)
    y = torch.nn.functional.linear(x_NI.to(dtype), widen(weight, dtype)).float() * x_scale
    return (y if bias is None else y + bias).to(dtype)


def _is_for_cpu(x_NI: Tensor, weight: Any, *_: Any, **__: Any) -> tuple[bool, str]:
    return isinstance(weight, Packed4CPU), "BF16 on a CPU, outputs in multiples of 16"


def _fits(x_NI: Tensor, weight: Any, *_: Any, dtype: torch.dtype = torch.bfloat16, **__: Any) -> tuple[bool, str]:
    ok = x_NI.is_cuda and isinstance(weight, Packed4) and dtype in (torch.bfloat16, torch.float16) and weight.group_size in GROUPS
    return ok, f"16 bits on a GPU, groups of {', '.join(map(str, GROUPS))}"


_IMPLEMENTATIONS = (
    Implementation("triton", _triton, _fits, triton_runs),
    Implementation("int4pack", _int4pack, _is_for_cpu),
    Implementation("torch", widened),
)
W4A16_MATMUL = Kernel("quant.w4a16_matmul", reference, _IMPLEMENTATIONS)
W4A8_MATMUL = Kernel("quant.w4a8_matmul", reference, _IMPLEMENTATIONS)
