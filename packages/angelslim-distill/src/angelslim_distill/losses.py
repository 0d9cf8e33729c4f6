"""How far a student's distribution of the next token is from its teacher's, of whole distributions and of what is kept of them.

Positions that do not count are left out before anything is computed, and all is computed in fp32 (fp64 stays fp64). Logits are aligned already:
nothing is shifted here.

Shapes: N positions that count, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from angelslim_core.errors import UsageError

from .kinds import NOTHING, KindName, Loss, TopKMode
from .targets import TopK

# least and, from 1, most that the rest of a top-k distribution may be
LEAST = 1e-8


@dataclass(frozen=True)
class Sums:
    """
    Args:
        total: [], the sum over positions that count.
        count: [], their number, of the same dtype.
    """

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean; zero, with a gradient of zero, if nothing counts."""
        return self.total / self.count.clamp(min=1)


def wide(x: Tensor) -> Tensor:
    """As fp32, or fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def top_k_of(logits: Tensor, k: int, labels: Tensor | None = None) -> TopK:
    """The k most likely tokens of whole distributions, as a cache keeps them.

    Args:
        logits: [..., V].
        labels: [...], int64; None: `label_logp` is NaN.

    Raises:
        UsageError: k is not from 1 to V.
    """
    _check_k(k, logits.shape[-1])
    logp = log_softmax(wide(logits.detach()), -1).clamp(min=NOTHING)
    kept, ids = logp.topk(k, -1)
    label = torch.full_like(logp[..., 0], torch.nan) if labels is None else logp.gather(-1, labels[..., None])[..., 0]
    return TopK(ids, kept, label)


def first_k(teacher: TopK, k: int | None) -> TopK:
    """The k most likely of those kept; None: all.

    Raises:
        UsageError: fewer are kept.
    """
    if k is None or k == teacher.ids.shape[-1]:
        return teacher
    _check_k(k, teacher.ids.shape[-1])
    return replace(teacher, ids=teacher.ids[..., :k], logp=teacher.logp[..., :k])


def _check_k(k: int, tokens: int) -> None:
    if not 1 <= k <= tokens:
        raise UsageError(908, "top_k", f"is {k}, of {tokens} tokens", "give a number from 1 to that")


def kept_losses(student: Tensor, teacher: Tensor, confidence: Tensor, loss: Loss, vocabulary: int) -> Tensor:
    """[N], of log-probabilities of K kept tokens.

    Args:
        student, teacher: [N, K], at the loss's temperature; normalized over the whole vocabulary, the teacher's only with "bucket".
        vocabulary: V; nothing is left beyond the kept tokens if it is K.
    """
    mode = loss.top_k_mode
    if mode == "renorm":
        student = log_softmax(student, -1)
    if mode != "bucket":
        teacher = log_softmax(teacher, -1)
    if mode != "renorm" and student.shape[-1] < vocabulary:
        student = torch.cat((student, _rest(student)), -1)
        teacher = torch.cat((teacher, _rest(teacher) if mode == "bucket" else torch.full_like(teacher[..., :1], NOTHING)), -1)
    return loss.total(student, teacher, confidence, vocabulary)


def _rest(logp: Tensor) -> Tensor:
    """[N, 1], log-probability of all tokens that are not among [N, K]."""
    return (1 - logp.exp().sum(-1, keepdim=True)).clamp(LEAST, 1 - LEAST).log()


def token_losses(student: Tensor, teacher: Tensor | TopK, loss: Loss, labels: Tensor | None = None, top_k: int | None = None) -> Tensor:
    """[N], the loss of each position; no gradient reaches the teacher.

    Args:
        student: [N, V], logits, fp32 or fp64.
        teacher: [N, V], logits, or what is kept of them.
        labels: [N], int64; only cakld needs them, and only of logits.
        top_k: how many of the teacher's tokens are told apart; None: all there are.

    Raises:
        UsageError: labels are missing, or the top k do not tell what the loss asks for.
    """
    vocabulary, rule = student.shape[-1], loss.rule
    confidence = _confidence(teacher, labels) if rule.confidence else student.new_zeros(())
    if isinstance(teacher, TopK):
        loss.check_kept(tempered=False)
        kept = first_k(teacher, top_k)
        logp = wide(kept.logp.detach()) / loss.temperature
    elif top_k is None:
        return loss.total(loss.numbers(student), loss.numbers(wide(teacher.detach())), confidence, vocabulary)
    else:
        loss.check_kept(tempered=True)
        kept = top_k_of(wide(teacher) / loss.temperature, top_k)
        logp = kept.logp
    return kept_losses(loss.numbers(student).gather(-1, kept.ids), logp.to(student.dtype), confidence.to(student.dtype), loss, vocabulary)


def _confidence(teacher: Tensor | TopK, labels: Tensor | None) -> Tensor:
    """[N], the teacher's probability of the labels, at temperature 1 and of the whole vocabulary."""
    if isinstance(teacher, TopK):
        return wide(teacher.label_logp.detach()).exp()
    if labels is None:
        raise labels_missing()
    return log_softmax(wide(teacher.detach()), -1).gather(-1, labels[..., None])[..., 0].exp()


def labels_missing() -> UsageError:
    """The error of a loss that needs labels and has none."""
    return UsageError(909, "labels", "none are given, and the loss needs the tokens that were predicted", "give labels, or another loss")


def kd_sums(
    student_logits: Tensor, teacher_logits: Tensor | TopK, mask: Tensor, loss: Loss, labels: Tensor | None = None, top_k: int | None = None
) -> Sums:  # fmt: skip
    """Sum over positions that count and their number, as `kd_loss` takes them: for means over several batches or processes.

    Raises:
        UsageError: shapes differ; as `token_losses`.
    """
    teacher_has = (teacher_logits if isinstance(teacher_logits, Tensor) else teacher_logits.ids).shape
    check_positions(student_logits.shape[:-1], teacher_has[:-1], mask, labels)
    check_vocabulary(student_logits.shape[-1], teacher_has[-1] if isinstance(teacher_logits, Tensor) else teacher_logits.tokens)
    mask = mask.bool()
    student = wide(student_logits[mask])
    teacher = teacher_logits[mask] if isinstance(teacher_logits, Tensor) else chosen(teacher_logits, mask)
    found = token_losses(student, teacher, loss, None if labels is None else labels[mask], top_k)
    # a sum over nothing has a gradient of zero, which is what those who wait for all gradients need
    return Sums(found.sum(), mask.sum().to(found.dtype))


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | TopK, mask: Tensor, kind: KindName = "kl", temperature: float = 1.0, top_k: int | None = None,
    labels: Tensor | None = None, beta: float = 0.5, top_k_mode: TopKMode = "bucket",
) -> Tensor:  # fmt: skip
    """Mean over the mask of how far the student's distributions are from the teacher's.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], or what a cache kept of them; never with a gradient.
        mask: [...], which positions count.
        kind: "kl" KL(teacher, student), also "kd"; "rkl" KL(student, teacher); "jsd" of beta; "cakld" both KL, weighed by the teacher's probability of
            the label at temperature 1; "mse" of logits, mean over V; "tvd" half the sum of differences of probabilities.
        temperature: divides both logits; the loss is multiplied by its square.
        top_k: how many of the teacher's most likely tokens are told apart; None: all.
        labels: [...], int64, the tokens predicted; for cakld.
        beta, top_k_mode: as for `Loss`.

    Returns:
        [], fp32 or fp64; 0 with a gradient of zero where no position counts.

    Raises:
        UsageError: an option is out of range, shapes differ, or the top k do not tell what the loss asks for.
    """
    return kd_sums(student_logits, teacher_logits, mask, Loss(kind, temperature, beta, top_k_mode), labels, top_k).mean


def uld_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask of the L1 distance between probabilities by rank, for students of another vocabulary than the teacher's.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., W], of positions that correspond to the student's.

    Source: arXiv:2402.12030 eq. 3 (universal logit distillation).
    """
    check_positions(student_logits.shape[:-1], teacher_logits.shape[:-1], mask, None)
    mask = mask.bool()
    sides = [wide(x[mask]).softmax(-1).sort(-1, descending=True).values for x in (student_logits, teacher_logits.detach())]
    most = max(side.shape[-1] for side in sides)
    student, teacher = (torch.nn.functional.pad(side, (0, most - side.shape[-1])) for side in sides)
    distance = (student - teacher.to(student.dtype)).abs().sum()
    return Sums(distance, mask.sum().to(distance.dtype)).mean


def chosen(kept: TopK, mask: Tensor | slice) -> TopK:
    """The distributions of some positions, in one row."""
    return replace(kept, ids=kept.ids[mask], logp=kept.logp[mask], label_logp=kept.label_logp[mask])


def check_positions(student: Sequence[int], teacher: Sequence[int], mask: Tensor, labels: Tensor | None) -> None:
    """Refuse what is not of the same positions.

    Args:
        student, teacher: the shapes of theirs.

    Raises:
        UsageError: they differ from each other, the mask's or the labels'.
    """
    if not [*student] == [*teacher] == [*mask.shape] or (labels is not None and labels.shape != mask.shape):
        told = "" if labels is None else f", labels {[*labels.shape]}"
        raise UsageError(903, "mask", f"{[*mask.shape]}, student {[*student]}, teacher {[*teacher]}{told}", "all are of the same positions")


def check_vocabulary(student: int, teacher: int | None) -> None:
    """Refuse another vocabulary.

    Args:
        teacher: None: it is said to be the student's.

    Raises:
        UsageError: the numbers of tokens differ.
    """
    if teacher is not None and student != teacher:
        hint = "cut what pads them if the tokenizer is the same; uld_loss compares different ones"
        raise UsageError(904, "logits", f"the student's vocabulary is of {student} tokens, the teacher's of {teacher}", hint)
