"""`quantize_rows`, `gated_rows` and `normed_rows` in one pass: a row, or some groups of it, stays in registers between its largest value and its codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from angelslim_core.schemes import Grid

# x + MAGIC - MAGIC rounds fp32 to the nearest whole number, ties to even, for |x| < 2^22
MAGIC = tl.constexpr(12582912.0)
# columns of a program that need not know a whole row
PART = 2048


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    else:  # gelu_tanh; torch adds 1 to the tangent too
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1.0 + (1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)))


@triton.jit
def _kernel(
    x, weight, normed, codes, scales, given, width, groups, row_stride, group_stride, eps,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, GIVEN: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = column < width
    if ACTIVATION == "":
        values = tl.load(x + row * width + column, inside, 0.0).to(tl.float32)
    else:
        at = x + row * 2 * width + column
        gate = _activated(tl.load(at, inside, 0.0).to(tl.float32), ACTIVATION).to(x.dtype.element_ty)
        values = (gate.to(tl.float32) * tl.load(at + width, inside, 0.0).to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
    if NORM != "":  # this program has the whole row
        values = values * tl.rsqrt(tl.div_rn(tl.sum(tl.sum(values * values, 1), 0), width.to(tl.float32)) + eps)
        by = tl.load(weight + column, inside, 0.0).to(tl.float32)
        values = values * (1.0 + by) if NORM == "one_plus_weight" else values.to(x.dtype.element_ty).to(tl.float32) * by
        values = values.to(x.dtype.element_ty).to(tl.float32)
        if LARGEST != 0.0:
            tl.store(normed + row * width + column, values.to(normed.dtype.element_ty), inside)
    if LARGEST == 0.0:
        tl.store(codes + row * width + column, values.to(codes.dtype.element_ty), inside)
        return
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
    codes, scales = _run(x_NI, x_NI.shape[1], grid, scale)
    assert scales is not None
    return codes, scales


def gated_rows(x_N2F: Tensor, activation: str, grid: Grid | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """As the reference."""
    return _run(x_N2F, x_N2F.shape[1] // 2, grid, scale, activation)


def normed_rows(
    x_NI: Tensor, weight_I: Tensor, eps: float, norm: str, grid: Grid | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As the reference, up to the order in which a row's squares are summed."""
    y = None if grid is None else x_NI.new_empty(x_NI.shape)
    codes, scales = _run(x_NI, x_NI.shape[1], grid, scale, norm=norm, weight=weight_I, normed=y, eps=eps)
    return codes if y is None else y, codes, scales


def _run(
    x: Tensor, width: int, grid: Grid | None, scale: Tensor | None, activation: str = "",
    norm: str = "", weight: Tensor | None = None, normed: Tensor | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    x = x.contiguous()
    rows = x.shape[0]
    integer = grid is not None and grid.type == "int"
    codes = x.new_empty(rows, width, dtype=x.dtype if grid is None else torch.int8 if integer else torch.float8_e4m3fn)
    scales = scale
    if grid is not None and grid.strategy == "group":
        assert grid.group_size
        size, groups = grid.group_size, triton.cdiv(width, grid.group_size)
        # rows next to each other, as block-wise scaled matmuls read them
        scales = x.new_empty(groups, rows, dtype=torch.float32).T
        tile = triton.next_power_of_2(groups) if norm else min(32, triton.next_power_of_2(groups))
    elif (grid is None or scale is not None) and not norm:
        size, groups, tile = PART, triton.cdiv(width, PART), 1
    else:
        size, groups, tile = triton.next_power_of_2(width), 1, 1
        scales = x.new_empty(rows, 1, dtype=torch.float32) if grid is not None and scale is None else scale
    written = scale is None and scales is not None
    _kernel[(rows, triton.cdiv(groups, tile))](
        x, x if weight is None else weight, x if normed is None else normed, codes, codes if scales is None else scales, codes if scale is None else scale,
        width, groups, scales.stride(0) if scales is not None and written else 0, scales.stride(1) if scales is not None and written else 0, eps,
        ACTIVATION=activation, NORM=norm, LARGEST=0.0 if grid is None else 127.0 if integer else 448.0, INTEGER=integer, GIVEN=scale is not None,
        GROUPS=tile, SIZE=size, num_warps=max(1, min(16, tile * size // 512)),
    )  # fmt: skip
    return codes, scales
