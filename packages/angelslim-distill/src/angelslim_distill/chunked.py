"""Losses from hidden states: heads are applied to some rows at a time, and no logits outlive their rows.

What a loss asks of the student's logits is found in the forward pass and carried on to hidden states and head at once, so that memory holds logits
of one chunk and gradients of the size of the parameters. A backward pass only multiplies.

Logits, of which there are two and in fp32, are of a quarter of the rows whose gradients are collected: products with those are then large, and what
is added to the head's gradient is added seldom, which matters for time and, in bf16, for its rounding.

Shapes: B rows, T positions, H hidden size, V vocabulary, N positions that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from angelslim_core.errors import UsageError

from .kernels.gradient import LOSS_GRADIENT, Finish, Losses, Task
from .kernels.scaling import SCALE
from .kinds import Loss
from .losses import check_positions, check_vocabulary, chosen, labels_missing
from .targets import Hidden, TopK

# bytes of logits and their gradients in memory at a time: with a head's gradient of 1.2 GB, all that the loss adds stays below 2.5 GiB
CHUNK_BYTES = 1_250_000_000


@dataclass(frozen=True)
class HeadSums:
    """
    Args:
        total: [], kd_weight * kd + ce_weight * ce, with gradient.
        kd: [], sum of the losses towards the teacher; ce: [], sum of the labels' cross entropy, 0 without labels. Without gradient.
        count: [], positions that count.
    """

    total: Tensor
    kd: Tensor
    ce: Tensor
    count: Tensor


def head_loss(
    student: Hidden, teacher: Hidden | TopK | None, mask: Tensor, loss: Loss, labels: Tensor | None = None, *, kd_weight: float = 1.0, ce_weight: float = 0.0,
    rows: int | None = None, logits_dtype: torch.dtype | None = None, executor: str = "auto",
) -> HeadSums:  # fmt: skip
    """Sums over positions that count, as `kd_sums` of the logits, which are never in memory together.

    Args:
        student: states [B, T, H] and head, of which those with `requires_grad` get gradients; a frozen head costs none.
        teacher: its states and head, or what is kept of its distributions; None: cross entropy alone.
        mask: [B, T], which positions count; on the CPU, wherever the rest is, the host need not wait for the device to know how many.
        labels: [B, T], int64; for cross entropy and for cakld of a `Hidden`.
        kd_weight, ce_weight: of the total; with those of a mean, one over a number that is known, gradients need no multiplication afterwards.
        rows: positions whose gradients are in memory at a time; None: as many as `CHUNK_BYTES` hold.
        logits_dtype: of logits in memory, to which products are rounded; None: fp32, or fp64 for such states. In bf16 it takes less time, and
            rounding puts gradients of a loss of .04 off by 5%, those of smaller ones by more.
        executor: of `distill.loss_gradient`.

    Raises:
        UsageError: shapes differ, labels are missing, or an option is out of range.
    """
    others = teacher.states if isinstance(teacher, Hidden) else student.states if teacher is None else teacher.ids
    check_positions(student.states.shape[:-1], others.shape[:-1], mask, labels)
    if teacher is not None:
        check_vocabulary(len(student.weight), len(teacher.weight) if isinstance(teacher, Hidden) else teacher.tokens)
    if labels is None and (ce_weight or (loss.rule.confidence and isinstance(teacher, Hidden))):
        raise labels_missing()
    if rows is not None and rows < 1:
        raise UsageError(907, "rows", f"is {rows}", "give the number of positions whose logits may be in memory, at least 1")
    device = student.states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.states.dtype
    states, weight = student.states.flatten(0, -2).to(dtype), student.weight.to(dtype)
    count, places = _places(mask, states.device)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (states, weight, student.bias))
    work = _Work(
        _of(teacher, dtype), None if labels is None else labels.reshape(-1), count, places, loss, kd_weight, ce_weight,
        (student.softcap, student.scale), rows, logits_dtype or (torch.float64 if dtype == torch.float64 else torch.float32), executor, wanted,
    )  # fmt: skip
    total, kd, ce = _HeadLoss.apply(states, weight, student.bias, work)
    return HeadSums(total, kd, ce, total.new_full((), count))


def _places(mask: Tensor, device: torch.device) -> tuple[int, Tensor | None]:
    """How many positions count, and which, [N]; None: all."""
    places = mask.reshape(-1).bool().nonzero()[:, 0]  # here the host waits for the mask's device
    if len(places) == mask.numel():
        return len(places), None
    if not places.is_cuda and device.type == "cuda":
        places = places.pin_memory()  # otherwise the copy waits for all that the device has to do
    return len(places), places.to(device, non_blocking=True)


def _of(teacher: Hidden | TopK | None, dtype: torch.dtype) -> Hidden | TopK | None:
    """The same, of positions in one row, without gradient."""
    if isinstance(teacher, TopK):
        return TopK(teacher.ids.flatten(0, -2), teacher.logp.detach().flatten(0, -2), teacher.label_logp.detach().reshape(-1))
    if teacher is None:
        return None
    states, weight = teacher.states.detach().flatten(0, -2), teacher.weight.detach()
    own = states.dtype if not torch.is_autocast_enabled(states.device.type) else dtype
    return Hidden(states.to(own), weight.to(own), None if teacher.bias is None else teacher.bias.detach(), teacher.softcap, teacher.scale)


@dataclass(frozen=True)
class _Work:
    """All that the sums depend on beside what has gradients."""

    teacher: Hidden | TopK | None
    labels: Tensor | None
    count: int
    places: Tensor | None
    loss: Loss
    kd_weight: float
    ce_weight: float
    finish: tuple[float | None, float]
    rows: int | None
    dtype: torch.dtype
    executor: str
    wanted: bool

    def at(self, start: int, stop: int) -> slice | Tensor:
        """Where some of the positions that count are among all; a slice copies nothing."""
        return slice(start, stop) if self.places is None else self.places[start:stop]

    def chunk(self, vocabulary: int, dtype: torch.dtype) -> tuple[int, int]:
        """Rows whose gradients, of a dtype, are in memory at a time, and rows whose logits are."""
        logits = self.dtype.itemsize * (2 if isinstance(self.teacher, Hidden) else 1)
        fit = int(CHUNK_BYTES / (vocabulary * (dtype.itemsize + logits / 4)))
        rows = self.rows or max(1, fit // 512 * 512 or fit)
        rows = max(1, min(rows, self.count))
        return rows, -(-rows // 4)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            needs = [work.wanted and need for need in ctx.needs_input_grad[:3]]
            sums, ctx.gradients = _sums(states, weight, bias, work, needs)
        kd, ce = sums
        ctx.mark_non_differentiable(kd, ce)
        return work.kd_weight * kd + work.ce_weight * ce, kd, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise UsageError(902, "head_loss", "a second backward pass, and its gradients are used up", "call it again for each backward pass")
        found, ctx.gradients = ctx.gradients, None
        for gradient in found:
            if gradient is not None:  # in place: a copy of a head's gradient is what is spared here
                SCALE(gradient, by)
        return *found, None


def _sums(states: Tensor, weight: Tensor, bias: Tensor | None, work: _Work, needs: list[bool]) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
    """Losses and cross entropies, and the gradients of states, weight and bias, as far as they are needed."""
    count, vocabulary = work.count, len(weight)
    rows, part = work.chunk(vocabulary, states.dtype)
    found = _Rows(weight, bias, work, part)
    dtype = torch.promote_types(work.dtype, torch.float32)
    sums: list[Losses] = []  # added up at the end: launches of so few numbers take longer than their work
    # rows that do not count are asked nothing; where nothing counts no row is
    of_states = (torch.empty_like if work.places is None else torch.zeros_like)(states) if needs[0] else None
    of_weight = (torch.empty_like if count else torch.zeros_like)(weight) if needs[1] else None
    of_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None
    memory = _memory(rows, vocabulary, states) if any(needs) else None
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        at = work.at(start, stop)
        own, asked = states[at], None if memory is None else memory[: stop - start]
        for first in range(start, stop, part):
            last = min(first + part, stop)
            piece = slice(first - start, last - start)
            sums.append(found(own[piece], work.at(first, last), None if asked is None else asked[piece]))
        if asked is None:
            continue
        if of_states is not None and isinstance(at, slice):
            torch.mm(asked, weight, out=of_states[at])
        elif of_states is not None:
            of_states[at] = asked @ weight
        if of_weight is not None and start == 0:
            torch.mm(asked.T, own, out=of_weight)
        elif of_weight is not None:
            of_weight.addmm_(asked.T, own)
        if of_bias is not None:
            of_bias += asked.sum(0, dtype=dtype)
    nothing = torch.zeros(0, dtype=dtype, device=states.device)
    kd, ce = (torch.cat(parts).sum() for parts in zip((nothing, nothing), *sums, strict=True))
    return (kd, ce), [of_states, of_weight, None if of_bias is None or bias is None else of_bias.to(bias.dtype)]


class _Rows:
    """Losses and gradients of some rows, whose logits are always in the same memory.

    Args:
        rows: most at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, work: _Work, rows: int) -> None:
        teacher = work.teacher
        self._work, self._weight = work, weight
        self._memory = [_memory(rows, len(weight), weight, work.dtype) for _ in range(2 if isinstance(teacher, Hidden) else 1)]
        to = Finish(teacher.bias, teacher.softcap, teacher.scale) if isinstance(teacher, Hidden) else Finish()
        self._task = Task(work.loss, work.kd_weight, work.ce_weight, Finish(bias, *work.finish), to)

    def __call__(self, states: Tensor, at: slice | Tensor, into: Tensor | None) -> Losses:
        """Losses and cross entropies.

        Args:
            states: [R, H], the student's.
            at: their places among all, of [R].
            into: [R, V], for gradients.
        """
        work, teacher = self._work, self._work.teacher
        towards: Tensor | TopK | None = None
        if isinstance(teacher, Hidden):
            towards = _product(teacher.states[at], teacher.weight, self._memory[1])
        elif teacher is not None:
            towards = chosen(teacher, at)
        labels = None if work.labels is None else work.labels[at]
        found: Losses = LOSS_GRADIENT(_product(states, self._weight, self._memory[0]), towards, labels, self._task, into, executor=work.executor)
        return found


def _memory(rows: int, vocabulary: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[R, V], whose rows begin where matrix products like them to."""
    return like.new_empty(rows, -(-vocabulary // 64) * 64, dtype=dtype)[:, :vocabulary]


def _product(states: Tensor, weight: Tensor, memory: Tensor) -> Tensor:
    """states [R, H] @ weight.T, [R, V], in some memory and its dtype."""
    out = memory[: len(states)]
    if out.dtype == weight.dtype:
        torch.mm(states, weight.T, out=out)
    elif weight.is_cuda and out.dtype == torch.float32:
        torch.mm(states, weight.T, out_dtype=torch.float32, out=out)
    else:  # a part of the head at a time
        accurate = torch.promote_types(out.dtype, torch.float32)
        for part, into in zip(weight.split(8192), out.split(8192, 1), strict=True):
            into.copy_(states.to(accurate) @ part.to(accurate).T)
    return out
