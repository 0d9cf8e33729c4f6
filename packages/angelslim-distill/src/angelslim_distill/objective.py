"""The loss of a step: a distillation loss, and the cross-entropy of the labels where it is asked for, as sums over the positions that count.

Shapes: B rows, T positions, N positions that count, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from angelslim_core.errors import UsageError

from .heads import logits_of
from .losses import Loss, chosen, kd_sums, token_losses
from .targets import Batch, Hidden, TopK

CHUNK = 512  # positions whose logits are there at a time


@dataclass(frozen=True)
class Objective:
    """lm_weight * cross-entropy + kd_weight * distillation loss, each a mean over the tokens that count.

    Args:
        top_k: how many of the teacher's tokens are told apart; None: all.

    Raises:
        UsageError: both weights are 0.
    """

    loss: Loss = field(default_factory=Loss)
    top_k: int | None = None
    lm_weight: float = 0.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.lm_weight and not self.kd_weight:
            raise UsageError(911, "kd_weight", "and lm_weight are 0, so that nothing is trained for", "give one of them")

    @property
    def weights(self) -> tuple[float, float]:
        """Of the two sums."""
        return self.kd_weight, self.lm_weight

    def sums(self, student: Hidden, teacher: Hidden | TopK, batch: Batch) -> Tensor:
        """[2], fp32: sums over the positions that count of the distillation loss and of the cross-entropy; a term of weight 0 is not computed.

        Args:
            student: with gradients; without any position that counts they are zero.
        """
        totals = student.states.new_zeros(2, dtype=torch.float32)
        for states, target, labels in chunks(student, teacher, batch):
            totals = totals + checkpoint(self._sums, student, states, target, labels, use_reentrant=False)
        return totals if totals.requires_grad else totals + student.states.sum() * 0

    def _sums(self, student: Hidden, states: Tensor, teacher: Hidden | TopK, labels: Tensor) -> Tensor:
        logits, none = logits_of(student, states), states.new_zeros((), dtype=torch.float32)
        kd = self._distance(logits, teacher, labels) if self.kd_weight else none
        return torch.stack((kd, cross_entropy(logits, labels, reduction="sum") if self.lm_weight else none))

    def _distance(self, logits: Tensor, teacher: Hidden | TopK, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = logits_of(teacher, teacher.states) if isinstance(teacher, Hidden) else teacher
        mask = torch.ones_like(labels, dtype=torch.bool)
        return kd_sums(*_alike(logits, wanted), mask, self.loss, labels, self.top_k).total


def chunks(student: Hidden, teacher: Hidden | TopK, batch: Batch) -> Iterator[tuple[Tensor, Hidden | TopK, Tensor]]:
    """The student's hidden states, the teacher's distributions and labels of some positions that count at a time: [N, H], of N, [N]."""
    at = batch.counted.nonzero(as_tuple=True)
    states, labels = student.states[at], batch.labels[at]
    if isinstance(teacher, Hidden):
        theirs = teacher.states[at]
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            yield states[part], Hidden(theirs[part], teacher.weight, teacher.bias, teacher.softcap, teacher.scale), labels[part]
    else:
        kept = chosen(teacher, batch.counted)
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            yield states[part], TopK(kept.ids[part], kept.logp[part], kept.label_logp[part]), labels[part]


def _alike(student: Tensor, teacher: Tensor | TopK) -> tuple[Tensor, Tensor | TopK]:
    """Logits without what only one of two heads has: rows that pad the same vocabulary."""
    if isinstance(teacher, TopK):
        return student, teacher
    size = min(student.shape[-1], teacher.shape[-1])
    return student[..., :size], teacher[..., :size]


@torch.no_grad()
def measures(student: Hidden, teacher: Hidden | TopK, batch: Batch) -> Tensor:
    """[5], fp64: sums over the positions that count of KL(teacher, student), of the negative log-likelihood of student and of teacher, of equal first
    choices, and their number. What is kept of a distribution counts its remainder as one token."""
    loss, totals = Loss(), student.states.new_zeros(5, dtype=torch.float64)
    for states, target, labels in chunks(student, teacher, batch):
        logits, wanted = _alike(logits_of(student, states), logits_of(target, target.states) if isinstance(target, Hidden) else target)
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
