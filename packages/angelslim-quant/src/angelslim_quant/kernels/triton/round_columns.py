"""`round_columns` as one program for a strip of outputs: the block stays in registers while its columns are rounded."""

# triton reads the annotations of a kernel's arguments, so they are no strings here
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import FORMATS, nearest, whole

if TYPE_CHECKING:
    from ..round_columns import Steps

# outputs a program
OUTPUTS = 32


@triton.jit
def _kernel(
    block, upper, pull, step, zero, group, levels, errors, outputs, width, half,
    LEAST: tl.constexpr, MOST: tl.constexpr, PART: tl.constexpr, LARGEST: tl.constexpr, ZERO: tl.constexpr, PULL: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    c = tl.arange(0, COLUMNS)
    some = o < outputs
    place = block + c[:, None].to(tl.int64) * outputs + o[None, :]
    inside = (c[:, None] < width) & some[None, :]
    w = tl.load(place, inside, 0.0)
    row = o.to(tl.int64)
    for i in range(width):
        column = tl.sum(tl.where(c[:, None] == i, w, 0.0), 0)
        at = tl.load(group + i).to(tl.int64) * outputs + o
        scale = tl.load(step + at, some, 1.0)
        x = tl.div_rn(column, scale)
        if LARGEST > 0:
            size = nearest(tl.abs(x), LEAST, MOST, PART, LARGEST)
            level = tl.where(x < 0.0, -size, size)
            value = level * scale
        else:
            level = whole(tl.minimum(tl.maximum(x, -1024.0), 1024.0))
            if ZERO:
                offset = tl.load(zero + at, some, 0.0)
                level = tl.minimum(tl.maximum(level + offset, -half), half - 1.0)
                value = (level - offset) * scale
            else:
                level = tl.minimum(tl.maximum(level, -half), half - 1.0)
                value = level * scale
        error = tl.div_rn(column - value, tl.load(upper + i * width + i))
        after = (c > i) & (c < width)
        w -= tl.load(upper + i * width + c, after, 0.0)[:, None] * error[None, :]
        if PULL:
            w += tl.load(pull + i * width + c, after, 0.0)[:, None] * column[None, :]
        tl.store(levels + row, level, some)
        tl.store(errors + row, error, some)
        row += outputs
    tl.store(place, w, inside)


def round_columns(block_BO: Tensor, upper_BB: Tensor, pull_BB: Tensor | None, steps: "Steps", group_B: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    width, outputs = block_BO.shape
    assert block_BO.is_contiguous()
    levels, errors = torch.empty_like(block_BO), torch.empty_like(block_BO)
    upper_BB = upper_BB.contiguous()
    pull_BB = upper_BB if pull_BB is None else pull_BB.contiguous()
    least, most, part, largest = FORMATS[steps.levels]
    _kernel[(triton.cdiv(outputs, OUTPUTS),)](
        block_BO, upper_BB, pull_BB, steps.step_GO, steps.step_GO if steps.zero_GO is None else steps.zero_GO, group_B, levels, errors,
        outputs, width, float(steps.half),
        LEAST=least, MOST=most, PART=part, LARGEST=largest, ZERO=steps.zero_GO is not None, PULL=pull_BB is not upper_BB,
        COLUMNS=max(16, triton.next_power_of_2(width)), OUTPUTS=OUTPUTS, num_warps=4,
    )  # fmt: skip
    return levels, errors
