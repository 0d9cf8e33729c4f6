"""Losses of logits whose vocabulary lies in shards on several processes: no process sees another's logits, and each gets its own shard's gradient.

Every process has all positions. What crosses between them is, of each position, the highest logit and sums.

Shapes: V_r tokens of the vocabulary on process r, in the order of the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .kinds import NOTHING, Loss
from .losses import Sums, check_positions, check_vocabulary, labels_missing, wide


class _Shared(torch.autograd.Function):
    """The sum over processes of what each uses for itself: all their gradients go to all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _over(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _over(gradient, ctx.group), None


class _Whole(torch.autograd.Function):
    """The sum over processes of parts of one result, of which each process has the same gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return _over(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _over(x: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group=group)
    return x


def sharded_kd_sums(
    student_shard: Tensor, teacher_shard: Tensor, mask: Tensor, loss: Loss, labels: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Sums:  # fmt: skip
    """As `kd_sums` of the whole logits, on every process; all of them must call it.

    Args:
        student_shard, teacher_shard: [..., V_r], logits of the same tokens.
        mask: [...], the same on all processes.
        labels: [...], int64, tokens of the whole vocabulary; for cakld.
        group: the processes that share a vocabulary; None: all.

    Raises:
        UsageError: shapes differ, or labels are missing.
    """
    check_positions(student_shard.shape[:-1], teacher_shard.shape[:-1], mask, labels)
    check_vocabulary(student_shard.shape[-1], teacher_shard.shape[-1])
    if loss.rule.confidence and labels is None:
        raise labels_missing()
    mask = mask.bool()
    student, teacher = wide(student_shard[mask]), wide(teacher_shard.detach()[mask])
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=student.device)
    rank = dist.get_rank(group)
    sizes[rank] = student.shape[-1]
    sizes = _over(sizes, group)
    numbers = [_numbers(x, loss.temperature, group) if loss.rule.normalized else x / loss.temperature for x in (student, teacher)]
    confidence = student.new_zeros(())
    if loss.rule.confidence and labels is not None:
        confidence = _of_labels(_numbers(teacher, 1.0, group), labels[mask] - sizes[:rank].sum(), group).exp()
    # the terms of this process's tokens; a mean's number of tokens is that of all
    found = loss.total(numbers[0], numbers[1].to(numbers[0].dtype), confidence.to(numbers[0].dtype), 1)
    if loss.rule.mean:
        found = found / sizes.sum()
    total = _Whole.apply(found.sum(), group)
    return Sums(total, mask.sum().to(total.dtype))


def _numbers(logits: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """[N, V_r], log-probabilities in the whole vocabulary."""
    tempered = logits / temperature
    highest = _over(tempered.detach().amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    total = _Shared.apply((tempered - highest).exp().sum(-1, keepdim=True), group)
    return (tempered - highest - total.log()).clamp(min=NOTHING)


def _of_labels(logp: Tensor, at: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[N], of which each is known to one process.

    Args:
        logp: [N, V_r].
        at: [N], the label's place among this process's tokens, if it is from 0 to V_r.
    """
    own = (at >= 0) & (at < logp.shape[-1])
    found = logp.gather(-1, at.clamp(0, logp.shape[-1] - 1)[:, None])[:, 0]
    return _over(torch.where(own, found, 0.0), group)
