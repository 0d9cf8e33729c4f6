"""Losses of some positions and what they ask of the student's logits, in one go, so that the logits need not be kept for a backward pass.

Shapes: R rows, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..kinds import Loss
from ..losses import token_losses, wide
from ..targets import TopK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Finish:
    """What a head makes of its product x = states @ weight.T: logits = cap((x + bias) * scale), cap(y) = softcap * tanh(y / softcap)."""

    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """Logits, fp32 or fp64.

        Args:
            x: [R, V], or some columns of it, given by [R, K], int64.
        """
        y = wide(x)
        if self.bias is not None:
            y = y + (self.bias if columns is None else self.bias[columns]).to(y.dtype)
        y = y * self.scale
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)

    def slope(self, y: Tensor) -> Tensor:
        """Derivative of logits y by the product."""
        return torch.full_like(y, self.scale) if self.softcap is None else self.scale * (1 - (y / self.softcap).square())


@dataclass(frozen=True)
class Task:
    """What is asked of each row: kd_weight * loss + ce_weight * cross entropy, and of what logits.

    Args:
        kd_weight, ce_weight: of the gradient only; the losses come without.
    """

    loss: Loss
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    student: Finish = field(default_factory=Finish)
    teacher: Finish = field(default_factory=Finish)


class Losses(NamedTuple):
    """
    Args:
        kd: [R], towards the teacher, 0 without one; ce: [R], the cross entropy of the labels, 0 without them. fp32 or fp64.
    """

    kd: Tensor
    ce: Tensor


def reference(x: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, task: Task, into: Tensor | None) -> Losses:
    """As autograd finds it.

    Args:
        x: [R, V], the student's product.
        teacher: [R, V], its product, or what is kept of its distribution; None: cross entropy alone.
        labels: [R], int64, for cross entropy and cakld.
        into: [R, V], where the gradient of the student's product is written; None: it is not wanted.
    """
    with torch.enable_grad():
        leaf = wide(x).detach().requires_grad_(into is not None)
        logits = task.student(leaf)
        nothing = logits[:, 0] * 0
        towards = task.teacher(teacher) if isinstance(teacher, Tensor) else teacher
        kd = nothing if towards is None else token_losses(logits, towards, task.loss, labels)
        ce = nothing if labels is None else cross_entropy(logits, labels, reduction="none")
        if into is not None:
            (gradient,) = torch.autograd.grad((task.kd_weight * kd + task.ce_weight * ce).sum(), leaf)
            into.copy_(gradient)
    return Losses(kd.detach(), ce.detach())


def _triton(x: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, task: Task, into: Tensor | None) -> Losses:
    if isinstance(teacher, Tensor):
        from .triton.whole import towards_whole

        return towards_whole(x, teacher, labels, task, into)
    from .triton.kept import towards_kept

    return towards_kept(x, teacher, labels, task, into)


def _held(x: Tensor, teacher: Tensor, labels: Tensor | None, task: Task, into: Tensor) -> Losses:
    from .triton.held import towards_whole_held

    return towards_whole_held(x, teacher, labels, task, into)


def _has_no_faster(x: Tensor, *_: object) -> tuple[bool, str]:
    return not x.is_cuda or x.dtype == torch.float64 or not triton_runs()[0], "tensors on the CPU, fp64, or no Triton"


def _fits(x: Tensor, teacher: Tensor | TopK | None, _labels: Tensor | None, _task: Task, into: Tensor | None) -> tuple[bool, str]:
    import triton

    if not x.is_cuda and not triton.knobs.runtime.interpret:
        return False, "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"
    rows = [r for r in (x, teacher, into) if isinstance(r, Tensor)]
    return all(r.dtype in DTYPES and r.stride(1) == 1 for r in rows), "fp32, bf16 or fp16, each row together in memory"


def _fits_held(x: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, task: Task, into: Tensor | None) -> tuple[bool, str]:
    if not isinstance(teacher, Tensor):
        return False, "whole distributions"
    from .triton.held import supports

    ok, why = _fits(x, teacher, labels, task, into)
    return supports(x, task, labels is not None, into is not None) if ok else (ok, why)


LOSS_GRADIENT = Kernel(
    "distill.loss_gradient",
    reference,
    (
        Implementation("torch", reference, _has_no_faster),
        Implementation("triton_held", _held, _fits_held, triton_runs),
        Implementation("triton", _triton, _fits, triton_runs),
    ),
)
