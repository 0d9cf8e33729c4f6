"""`quantize_rows` in one pass: a row, or some groups of it, stays in registers between its largest value and its codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from angelslim_core.schemes import Grid

# x + MAGIC - MAGIC rounds fp32 to the nearest whole number, ties to even, for |x| < 2^22
MAGIC = tl.constexpr(12582912.0)
# largest row that fits into the registers of a program
WIDEST = 32768


@triton.jit
def _kernel(
    x, codes, scales, given, width, groups, row_stride, group_stride,
    LARGEST: tl.constexpr, INTEGER: tl.constexpr, GIVEN: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = column < width
    values = tl.load(x + row * width + column, inside, 0.0).to(tl.float32)
    if GIVEN:
        step = tl.load(given).to(tl.float32) + tl.zeros([GROUPS], tl.float32)
    else:
        step = tl.div_rn(tl.max(tl.abs(values), 1), tl.zeros([GROUPS], tl.float32) + LARGEST)
        tl.store(scales + row * row_stride + g * group_stride, step, g < groups)
    ratio = tl.where(step[:, None] > 0.0, tl.div_rn(values, tl.where(step > 0.0, step, 1.0)[:, None] + tl.zeros_like(values)), 0.0)
    if INTEGER:
        whole = (tl.minimum(tl.maximum(ratio, -1024.0), 1024.0) + MAGIC) - MAGIC
        code = tl.minimum(tl.maximum(whole, -LARGEST - 1.0), LARGEST).to(tl.int8)
    else:
        # to nearest by hand, as not every conversion is; a step is an eighth of the power of two below
        size = tl.minimum(tl.abs(ratio), LARGEST)
        power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        whole = tl.maximum(power, 0.015625) * (1.5 * 1048576.0)
        size = (size + whole) - whole
        code = tl.where(ratio < 0.0, -size, size).to(tl.float8e4nv)
    tl.store(codes + row * width + column, code, inside)


def quantize_rows(x_NI: Tensor, grid: Grid, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As the reference."""
    x_NI = x_NI.contiguous()
    rows, width = x_NI.shape
    integer = grid.type == "int"
    codes = torch.empty_like(x_NI, dtype=torch.int8 if integer else torch.float8_e4m3fn)
    if grid.strategy == "group":
        assert grid.group_size
        size, groups = grid.group_size, triton.cdiv(width, grid.group_size)
        # rows next to each other, as block-wise scaled matmuls read them
        scales = x_NI.new_empty(groups, rows, dtype=torch.float32).T
        tile = min(32, triton.next_power_of_2(groups))
    else:
        groups, tile = 1, 1
        size = triton.next_power_of_2(width) if scale is None else 2048
        if scale is not None:
            groups, tile = triton.cdiv(width, size), 1
        scales = x_NI.new_empty(rows, 1, dtype=torch.float32) if scale is None else scale
    _kernel[(rows, triton.cdiv(groups, tile))](
        x_NI, codes, scales, scales if scale is None else scale, width, groups, scales.stride(0) if scale is None else 0, scales.stride(1) if scale is None else 0,
        LARGEST=127.0 if integer else 448.0, INTEGER=integer, GIVEN=scale is not None, GROUPS=tile, SIZE=size,
        num_warps=max(1, min(16, tile * size // 512)),
    )  # fmt: skip
    return codes, scales
