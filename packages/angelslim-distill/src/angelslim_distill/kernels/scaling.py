"""Gradients that were found in a forward pass, multiplied by what the backward pass brings.

Plain torch multiplies BF16 on a GPU by one FP32 number there at a fifth of the memory's speed, having rounded that number to BF16.
"""

from __future__ import annotations

from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..losses import wide
from .gradient import DTYPES

PIECE = 1 << 24  # numbers of which a wider copy is made at a time


def reference(x: Tensor, factor: Tensor) -> None:
    """x * factor in place of x, rounded once.

    Args:
        x: [...], any floating dtype.
        factor: [], fp32 or fp64, on the same device.
    """
    x.copy_(wide(x) * factor)


def _torch(x: Tensor, factor: Tensor) -> None:
    if x.device.type == "cpu" and factor == 1:  # elsewhere the host would have to wait for it
        return
    for piece in x.split(max(1, PIECE * len(x) // max(1, x.numel()))):
        piece.copy_(wide(piece) * factor)


def _triton(x: Tensor, factor: Tensor) -> None:
    from .triton.scaling import scale

    scale(x, factor)


def _has_no_faster(x: Tensor, _factor: Tensor) -> tuple[bool, str]:
    return not x.is_cuda or not triton_runs()[0] or not _fits(x, _factor)[0], "tensors on the CPU, fp64, with gaps, or no Triton"


def _fits(x: Tensor, _factor: Tensor) -> tuple[bool, str]:
    import triton

    if not x.is_cuda and not triton.knobs.runtime.interpret:
        return False, "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"
    return x.dtype in DTYPES and x.is_contiguous(), "fp32, bf16 or fp16, in one piece"


SCALE = Kernel("distill.scale", reference, (Implementation("torch", _torch, _has_no_faster), Implementation("triton", _triton, _fits, triton_runs)))
