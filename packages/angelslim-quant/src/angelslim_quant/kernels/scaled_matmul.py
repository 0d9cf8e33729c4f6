"""FP8 and INT8 products of codes, scaled: y = (x codes * x scale) (w codes * w scale)^T + bias.

Shapes: N rows, O out features, I in features; scales of inputs [N, 1], [N, ceil(I / 128)] or [1], of weights [O, 1], [1]
or, for FP8 in blocks, [ceil(O / 128), ceil(I / 128)] with columns added up to a multiple of 4, as cuBLAS reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from .available import block_scaled_mm, fp8_tensor_cores

BLOCK = 128
# sums of row-wise FP8 stay in the tensor cores; promoting them to fp32 on the way is more exact and slower
FAST_ACCUM = True
# rows from which cuBLAS takes scales of rows, and of blocks; fewer go to Triton, whose tiles fit them
ROW_WISE_FROM, BLOCKS_FROM = 65, 64
# rows from which a CPU widens INT8 weights: 512 rows of 2048 x 2048 take 66 ms so, and 105 ms by `_weight_int8pack_mm` (AVX2, one core)
CPU_ROWS = 64
# outputs at a time that the slow ways widen
PIECE = 2048


def spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """A scale as it multiplies codes [rows, columns], broadcastable; blocks and groups are of 128."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape[1] > 1 or columns <= BLOCK:
        scale = scale.repeat_interleave(BLOCK, 1)[:, :columns]
    return scale if scale.shape[0] == rows else scale.repeat_interleave(BLOCK, 0)[:rows]


def reference(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, O] in `dtype`: widened to fp64, multiplied, rounded once."""
    x = x_NI.double() * spread(x_scale, *x_NI.shape)
    w = w_OI.double() * spread(w_scale, *w_OI.shape)
    y = x @ w.T
    return (y if bias is None else y + bias).to(dtype)


def pieces(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As `reference` in fp32, a piece of the weight at a time."""
    x = x_NI.float() * spread(x_scale, *x_NI.shape)
    y = torch.empty(x_NI.shape[0], w_OI.shape[0], dtype=dtype, device=x_NI.device)
    scale = w_scale
    for start in range(0, w_OI.shape[0], PIECE):
        rows = slice(start, start + PIECE)
        if w_scale.numel() > 1:
            scale = w_scale[rows] if w_scale.shape[0] == w_OI.shape[0] else w_scale[start // BLOCK : (start + PIECE) // BLOCK]
        part = w_OI[rows]
        found = torch.nn.functional.linear(x, part.float() * spread(scale, *part.shape), None if bias is None else bias[rows].float())
        y[:, rows] = found.to(dtype)
    return y


def whole_mm(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Row-wise (or one scale each) through cuBLAS or CUTLASS, whichever torch takes."""
    rowwise = w_scale.numel() > 1
    return torch._scaled_mm(
        x_NI, w_OI.T, x_scale, w_scale.T if rowwise else w_scale, bias=bias, out_dtype=dtype, use_fast_accum=FAST_ACCUM
    )  # fmt: skip


def _scaled_mm(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if w_scale.numel() > 1 and x_NI.shape[0] < ROW_WISE_FROM and triton_runs()[0]:
        return _triton(x_NI, x_scale, w_OI, w_scale, bias, dtype)
    return whole_mm(x_NI, x_scale, w_OI, w_scale, bias, dtype)


def block_mm(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, scale_KO: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Through cuBLAS, which wants both scales with their first axis dense."""
    from torch.nn.functional import ScalingType, scaled_mm  # type: ignore[attr-defined]

    y = scaled_mm(
        x_NI, w_OI.T, scale_a=x_scale, scale_recipe_a=ScalingType.BlockWise1x128, scale_b=scale_KO, scale_recipe_b=ScalingType.BlockWise128x128, output_dtype=dtype
    )  # fmt: skip
    return y if bias is None else y + bias


def _blocks(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if x_NI.shape[0] < BLOCKS_FROM or x_NI.shape[0] % 4:  # cuBLAS reads scales 16 bytes at a time
        return _triton(x_NI, x_scale, w_OI, w_scale, bias, dtype)
    return block_mm(x_NI, x_scale, w_OI, w_scale.T, bias, dtype)


def _triton(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    from .triton.scaled_matmul import scaled_matmul

    return scaled_matmul(x_NI, x_scale, w_OI, w_scale, bias, dtype)


def _int_mm(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Through cuBLAS, which takes 17 rows or more and leaves scaling to us."""
    rows = x_NI.shape[0]
    if rows < 32:
        x_NI = torch.nn.functional.pad(x_NI, (0, 0, 0, 32 - rows))
    y = torch._int_mm(x_NI, w_OI.T)[:rows].float() * x_scale * w_scale.reshape(1, -1)
    return (y if bias is None else y + bias).to(dtype)


def _int8pack(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """On CPUs that multiply INT8 no faster than BF16, few rows go back to BF16, and the weight is read as it is; many are worth its widening."""
    if x_NI.shape[0] >= CPU_ROWS:
        return pieces(x_NI, x_scale, w_OI, w_scale, bias, dtype)
    x = (x_NI.float() * x_scale).to(dtype)
    y = torch.ops.aten._weight_int8pack_mm(x, w_OI, w_scale.reshape(-1).expand(w_OI.shape[0]).to(dtype))
    return y if bias is None else y + bias


def _divides(x_NI: Tensor, w_OI: Tensor, by: int) -> bool:
    return x_NI.is_cuda and w_OI.shape[0] % by == 0 and w_OI.shape[1] % by == 0


def _is_block(w_OI: Tensor, w_scale: Tensor) -> bool:
    return w_scale.numel() > 1 and w_scale.shape != (w_OI.shape[0], 1)


def _scaled_mm_fits(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, *_: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, str]:
    alike = x_scale.dim() == 1 if w_scale.numel() == 1 else x_scale.shape[-1] == 1 and x_scale.dim() == 2 and not _is_block(w_OI, w_scale)
    return _divides(x_NI, w_OI, 16) and alike and dtype == torch.bfloat16, "BF16 on a GPU, sizes in multiples of 16, scales of rows on both sides or of neither"


def _blocks_fit(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, *_: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, str]:
    ok = _divides(x_NI, w_OI, 16) and x_NI.shape[1] % BLOCK == 0 and _is_block(w_OI, w_scale) and dtype == torch.bfloat16
    return ok, "BF16 on a GPU, inputs in multiples of 128, scales of blocks"


def _on_gpu(x_NI: Tensor, *_: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, str]:
    return x_NI.is_cuda and x_NI.shape[1] % 16 == 0, "on a GPU, inputs in multiples of 16"


def _int_mm_fits(x_NI: Tensor, x_scale: Tensor, w_OI: Tensor, *_: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, str]:
    return _divides(x_NI, w_OI, 8), "on a GPU, sizes in multiples of 8"


def _int8pack_fits(x_NI: Tensor, *_: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, str]:
    return x_NI.device.type == "cpu" and dtype == torch.bfloat16, "BF16 on a CPU"


def _triton_fp8() -> tuple[bool, str]:
    ok, why = triton_runs()
    return fp8_tensor_cores() if ok else (ok, why)


FP8_MATMUL = Kernel(
    "quant.fp8_matmul",
    reference,
    (
        Implementation("scaled_mm", _scaled_mm, _scaled_mm_fits, fp8_tensor_cores),
        Implementation("scaled_mm blocks", _blocks, _blocks_fit, block_scaled_mm),
        Implementation("triton", _triton, _on_gpu, _triton_fp8),
        Implementation("torch", pieces),
    ),
)
INT8_MATMUL = Kernel(
    "quant.int8_matmul",
    reference,
    (
        Implementation("triton", _triton, _on_gpu, triton_runs),
        Implementation("int_mm", _int_mm, _int_mm_fits),
        Implementation("int8pack", _int8pack, _int8pack_fits),
        Implementation("torch", pieces),
    ),
)
