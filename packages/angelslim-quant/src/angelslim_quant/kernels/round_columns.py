"""One block of GPTQ's loop: columns rounded in turn, the error of each moved into those after it (2210.17323, algorithm 1)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.rounding import cast_e4m3, round_e2m1

# floats: the element value nearest to each
ELEMENTS = {"e2m1": round_e2m1, "e4m3": lambda x: cast_e4m3(x).float()}


class Steps(NamedTuple):
    """Which values a column may take.

    Args:
        step_GO: what an element value of group g and output o is multiplied by, fp32.
        zero_GO: zero points of integers, fp32, or None.
        levels: "int": whole numbers in [-half, half - 1]; "e2m1": FP4 values; "e4m3": FP8 values.
        half: of integers.
    """

    step_GO: Tensor
    zero_GO: Tensor | None
    levels: Literal["int", "e2m1", "e4m3"]
    half: int = 0


def reference(block_BO: Tensor, upper_BB: Tensor, pull_BB: Tensor | None, steps: Steps, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Element values [B, O] and errors [B, O] divided by the diagonal, fp32; the block ends as each column stood when it was rounded.

    Args:
        block_BO: columns of a weight, fp32, changed in place.
        upper_BB: upper factor of the inverse Hessian.
        pull_BB: upper; what each column adds to those after it (GPTAQ's drift), or None.
        group_B: number of each column's group.
    """
    levels, errors = torch.empty_like(block_BO), torch.empty_like(block_BO)
    for i, group in enumerate(group_B.tolist()):
        column = block_BO[i]
        step = steps.step_GO[group]
        if steps.levels != "int":
            levels[i] = ELEMENTS[steps.levels](column / step)
            value = levels[i] * step
        elif steps.zero_GO is None:
            levels[i] = (column / step).round_().clamp_(-steps.half, steps.half - 1)
            value = levels[i] * step
        else:
            zero = steps.zero_GO[group]
            levels[i] = (column / step).round_().add_(zero).clamp_(-steps.half, steps.half - 1)
            value = (levels[i] - zero) * step
        errors[i] = (column - value) / upper_BB[i, i]
        if i + 1 < len(block_BO):
            block_BO[i + 1 :].addr_(upper_BB[i, i + 1 :], errors[i], alpha=-1)
            if pull_BB is not None:
                block_BO[i + 1 :].addr_(pull_BB[i, i + 1 :], column)
    return levels, errors


def _triton(block_BO: Tensor, upper_BB: Tensor, pull_BB: Tensor | None, steps: Steps, group_B: Tensor) -> tuple[Tensor, Tensor]:
    from .triton.round_columns import round_columns

    return round_columns(block_BO, upper_BB, pull_BB, steps, group_B)


def _on_gpu(block_BO: Tensor, *_: object) -> tuple[bool, str]:
    return block_BO.is_cuda and block_BO.shape[0] <= 128, "blocks of at most 128 columns on a GPU"


ROUND_COLUMNS = Kernel(
    "quant.round_columns",
    reference,
    (Implementation("triton", _triton, _on_gpu, triton_runs), Implementation("torch", reference)),
)
