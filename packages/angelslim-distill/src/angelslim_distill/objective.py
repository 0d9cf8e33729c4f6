"""The loss of a step: a distillation loss, and the cross-entropy of the labels where it is asked for, as sums over the positions that count.

Shapes: B rows, T positions, N positions that count, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from angelslim_core.errors import UsageError

from .chunked import head_loss
from .heads import logits_of
from .kinds import Loss
from .losses import chosen, first_k, token_losses
from .targets import Batch, Hidden, TopK

CHUNK = 512  # positions whose logits are there at a time


class Sums(NamedTuple):
    """Sums over the positions that count.

    Args:
        total: [], fp32, kd_weight * kd + lm_weight * lm, with gradient.
        kd: [], of the distillation loss; lm: [], of the cross-entropy; without gradient, 0 where the weight is.
    """

    total: Tensor
    kd: Tensor
    lm: Tensor


@dataclass(frozen=True)
class Objective:
    """lm_weight * cross-entropy + kd_weight * distillation loss, each a mean over the tokens that count.

    Args:
        top_k: how many of the teacher's tokens are told apart; None: all.

    Raises:
        UsageError: both weights are 0, or some of the teacher's tokens do not tell what the loss asks for.
    """

    loss: Loss = field(default_factory=Loss)
    top_k: int | None = None
    lm_weight: float = 0.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.lm_weight and not self.kd_weight:
            raise UsageError(911, "kd_weight", "and lm_weight are 0, so that nothing is trained for", "give one of them")
        if self.top_k is not None:
            self.loss.check_kept(tempered=True)

    def sums(self, student: Hidden, teacher: Hidden | TopK | None, batch: Batch) -> Sums:
        """What a step sums up; zero, with gradients of zero, without any position that counts.

        Args:
            teacher: None: there is only cross-entropy.
        """
        if teacher is not None:
            student, teacher = alike(student, teacher)
        if self.top_k is None or not isinstance(teacher, Hidden):
            kept = first_k(teacher, self.top_k) if isinstance(teacher, TopK) else teacher
            found = head_loss(student, kept, batch.counted, self.loss, batch.labels, kd_weight=self.kd_weight, ce_weight=self.lm_weight)
            return Sums(found.total, found.kd, found.ce)
        return self._dense(student, teacher, batch)

    def _dense(self, student: Hidden, teacher: Hidden, batch: Batch) -> Sums:
        """Logits of some positions at a time, made anew on the way back."""
        kd = lm = student.states.sum() * 0.0
        for states, target, labels in chunks(student, teacher, batch):
            parts = checkpoint(self._part, student, states, target, labels, use_reentrant=False)
            kd, lm = kd + parts[0], lm + parts[1]
        return Sums(self.kd_weight * kd + self.lm_weight * lm, kd.detach(), lm.detach())

    def _part(self, student: Hidden, states: Tensor, teacher: Hidden | TopK, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(student, states)
        with torch.no_grad():
            wanted = logits_of(teacher, teacher.states) if isinstance(teacher, Hidden) else teacher
        kd = token_losses(logits, wanted, self.loss, labels, self.top_k).sum()
        return kd, cross_entropy(logits, labels, reduction="sum") if self.lm_weight else logits.new_zeros(())


def alike(student: Hidden, teacher: Hidden | TopK) -> tuple[Hidden, Hidden | TopK]:
    """Both over one vocabulary. Heads of one width are as they are, padding included; of others only tokens that the tokenizer knows are left."""
    if isinstance(teacher, TopK):
        return student.of_first(teacher.tokens or len(student.weight)), teacher
    sizes = len(student.weight), len(teacher.weight)
    size = max(sizes) if sizes[0] == sizes[1] else min(*sizes, teacher.tokens or sizes[1])
    return student.of_first(size), teacher.of_first(size)


def chunks(student: Hidden, teacher: Hidden | TopK, batch: Batch) -> Iterator[tuple[Tensor, Hidden | TopK, Tensor]]:
    """The student's hidden states, the teacher's distributions and labels of some positions that count at a time: [N, H], of N, [N]."""
    at = batch.counted.nonzero(as_tuple=True)
    states, labels = student.states[at], batch.labels[at]
    if isinstance(teacher, Hidden):
        theirs = teacher.states[at]
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            yield states[part], replace(teacher, states=theirs[part]), labels[part]
    else:
        kept = chosen(teacher, batch.counted)
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            yield states[part], TopK(kept.ids[part], kept.logp[part], kept.label_logp[part]), labels[part]


@torch.no_grad()
def measures(student: Hidden, teacher: Hidden | TopK, batch: Batch) -> Tensor:
    """[5], fp64: sums over the positions that count of KL(teacher, student), of the negative log-likelihood of student and of teacher, of equal first
    choices, and their number. What is kept of a distribution counts its remainder as one token."""
    student, teacher = alike(student, teacher)
    loss, totals = Loss(), student.states.new_zeros(5, dtype=torch.float64)
    for states, target, labels in chunks(student, teacher, batch):
        logits, wanted = logits_of(student, states), logits_of(target, target.states) if isinstance(target, Hidden) else target
        first = wanted.argmax(-1) if isinstance(wanted, Tensor) else wanted.ids[:, 0]
        theirs = wanted.log_softmax(-1).gather(-1, labels[:, None])[:, 0] if isinstance(wanted, Tensor) else wanted.label_logp
        found = (
            token_losses(logits, wanted, loss, labels).sum(),
            cross_entropy(logits, labels, reduction="sum"),
            -theirs.sum(),
            (logits.argmax(-1) == first).sum(),
            torch.tensor(len(labels), device=labels.device),
        )
        totals += torch.stack([f.double() for f in found])
    return totals
