"""`quantize_fp8` as one program for whatever shares a scale: once over it for absmax, once more, from the cache, for the codes."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
import torch
import triton
import triton.language as tl
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.schemes import Grid

from .rounding import divided, e4m3_byte, narrowed, nearest

# weights a program looks at together
WEIGHTS = 2048


@triton.jit
def _kernel(
    weight, codes, scales, rows, columns, tall, wide, across,
    GIVEN: tl.constexpr, SINGLE: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    top, left = (block // across) * tall, (block % across) * wide
    height, width = tl.minimum(tall, rows - top).to(tl.int32), tl.minimum(wide, columns - left).to(tl.int32)
    r = tl.arange(0, TALL)[:, None]
    c = tl.arange(0, WIDE)[None, :]
    if GIVEN:
        scale = tl.load(scales + (0 if SINGLE else block)).to(tl.float32)
    else:
        peak = tl.zeros((WIDE,), tl.float32)
        for row in range(0, height, TALL):
            for column in range(0, width, WIDE):
                inside = (r < height - row) & (c < width - column)
                first = (top + row) * columns + left + column
                w = tl.load(weight + first + (r * columns + c), inside, 0.0).to(tl.float32)
                peak = tl.maximum(peak, tl.max(tl.abs(w), 0))
        scale = narrowed(divided(tl.max(peak, 0), 448.0), scales.dtype.element_ty)
        scale = tl.where(scale > 0, scale, 1.0)
        tl.store(scales + block, scale.to(scales.dtype.element_ty))
    for row in range(0, height, TALL):
        for column in range(0, width, WIDE):
            inside = (r < height - row) & (c < width - column)
            first = (top + row) * columns + left + column
            x = divided(tl.load(weight + first + (r * columns + c), inside, 0.0).to(tl.float32), scale)
            byte = e4m3_byte(nearest(tl.abs(x), 0.015625, 256.0, 0.125, 448.0)) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
            tl.store(codes + first + (r * columns + c), byte.to(tl.uint8), inside)


def quantize_fp8(weight_OI: Tensor, grid: Grid, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the reference; a tensor's scale must be given."""
    rows, columns = weight_OI.shape
    tall, wide = grid.block_structure if grid.strategy == "block" and grid.block_structure else (1, columns)
    weight_OI = weight_OI.contiguous()
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight_OI.device)
    found = torch.empty(grid.scale_shape((rows, columns)), dtype=torch_dtype(grid.scale_dtype), device=weight_OI.device) if scale is None else scale
    width = min(triton.next_power_of_2(wide), WEIGHTS)
    across = triton.cdiv(columns, wide)
    _kernel[(triton.cdiv(rows, tall) * across,)](
        weight_OI, codes, found.contiguous(), rows, columns, tall, wide, across,
        GIVEN=scale is not None, SINGLE=grid.strategy == "tensor", TALL=min(triton.next_power_of_2(tall), WEIGHTS // width), WIDE=width,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes.view(torch.float8_e4m3fn), found
