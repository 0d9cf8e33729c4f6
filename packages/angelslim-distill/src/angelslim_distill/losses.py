"""How far a student's distribution of the next token is from its teacher's.

One rule for all: the temperature T divides the logits of both, and the loss is multiplied by T squared, so that gradients keep their size.
Positions that do not count are left out before anything is computed, and all is computed in fp32 (fp64 stays fp64).
Logits are aligned already: nothing is shifted here.

Shapes: N positions that count, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from angelslim_core.errors import UsageError

from .targets import TopK

# stands for the logarithm of zero: its exp is zero, and unlike -inf no difference or product of it is NaN
NOTHING = -1e30
# least and, from 1, most that the remainder of a top-k distribution may be
LEAST = 1e-8


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Terms of KL(teacher, student) of log-probabilities."""
    return teacher.exp() * (teacher - student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Terms of KL(student, teacher)."""
    return forward_kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Terms of beta KL(teacher, m) + (1 - beta) KL(student, m), m = beta teacher + (1 - beta) student.

    By definition KL(teacher, student) at beta 0 and KL(student, teacher) at 1. Those are the limits of jsd / beta and jsd / (1 - beta): jsd
    itself goes to zero there, so that the value jumps at the ends.

    Source: arXiv:2306.13649 §2 (GKD).
    """
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student, teacher)
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * forward_kl(mixed, teacher) + (1 - beta) * forward_kl(mixed, student)


def confidence_weighted(student: Tensor, teacher: Tensor, confidence: Tensor) -> Tensor:
    """Terms of c KL(student, teacher) + (1 - c) KL(teacher, student), c being the teacher's probability of the label.

    Source: arXiv:2402.10631 eq. 8 (BitDistiller), with a token's own c for the mean of a data set.
    """
    return confidence * reverse_kl(student, teacher) + (1 - confidence) * forward_kl(student, teacher)


@dataclass(frozen=True)
class Kind:
    """A loss, as the sum of a function of two numbers for each token of the vocabulary.

    Args:
        terms: (student's, teacher's, confidence [..., 1], beta) -> terms of the sum.
        normalized: whether the numbers are log-probabilities, not logits.
        mean: whether the mean is taken over the vocabulary, not the sum.
        confidence: whether the teacher's probability of the label is needed.
        unbounded: whether it is infinite where the teacher excludes a token.
    """

    terms: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    normalized: bool = True
    mean: bool = False
    confidence: bool = False
    unbounded: bool = False


KINDS = {
    "kl": Kind(lambda s, t, c, beta: forward_kl(s, t)),
    "kd": Kind(lambda s, t, c, beta: forward_kl(s, t)),  # the name that goes with a temperature: arXiv:1503.02531 §2
    "rkl": Kind(lambda s, t, c, beta: reverse_kl(s, t), unbounded=True),
    "jsd": Kind(lambda s, t, c, beta: jensen_shannon(s, t, beta)),
    "cakld": Kind(lambda s, t, c, beta: confidence_weighted(s, t, c), confidence=True, unbounded=True),
    "tvd": Kind(lambda s, t, c, beta: 0.5 * (s.exp() - t.exp()).abs()),
    "mse": Kind(lambda s, t, c, beta: (s - t).square(), normalized=False, mean=True),
}
KindName = Literal["kl", "rkl", "jsd", "cakld", "mse", "tvd", "kd"]
TopKMode = Literal["bucket", "renorm", "zero"]
MODES = ("bucket", "renorm", "zero")


@dataclass(frozen=True)
class Loss:
    """Which loss, checked.

    Args:
        kind: a name of `KINDS`.
        temperature: above zero.
        beta: of jsd, from 0, which is kl, to 1, which is rkl.
        top_k_mode: what is done with the rest of a vocabulary of which k tokens are kept: "bucket" makes it one more token of both, "renorm" leaves
            it out of both, "zero" gives it no probability in the teacher and leaves the student's as it is.

    Raises:
        UsageError: there is no such loss.
    """

    kind: KindName = "kl"
    temperature: float = 1.0
    beta: float = 0.5
    top_k_mode: TopKMode = "bucket"

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("top_k_mode", self.top_k_mode, MODES)):
            if value not in known:
                raise UsageError(900, name, f"is {value!r}, which there is not", f"choose one of: {', '.join(known)}")
        ranges = (("temperature", 0 < self.temperature < math.inf, "above 0, which divides logits"), ("beta", 0 <= self.beta <= 1, "from 0 (kl) to 1 (rkl)"))
        for name, fits, what in ranges:
            if not fits:
                raise UsageError(901, name, f"is {getattr(self, name)}", f"give a number {what}")

    @property
    def rule(self) -> Kind:
        return KINDS[self.kind]

    def numbers(self, logits: Tensor) -> Tensor:
        """What the kind compares of raw logits [..., V]."""
        tempered = logits / self.temperature
        return log_softmax(tempered, -1).clamp(min=NOTHING) if self.rule.normalized else tempered

    def total(self, student: Tensor, teacher: Tensor, confidence: Tensor, vocabulary: int) -> Tensor:
        """[N] of [N, M] numbers each, of all M = V tokens or some.

        Args:
            confidence: [N] or, where it is not needed, anything.
            vocabulary: tokens over which a mean is taken.
        """
        terms = self.rule.terms(student, teacher, confidence[..., None], self.beta).sum(-1)
        return self.temperature**2 * (terms / vocabulary if self.rule.mean else terms)

    def check_kept(self, tempered: bool) -> None:
        """Refuse what a top-k distribution does not tell.

        Args:
            tempered: whether the log-probabilities are of this temperature.
        """
        if not self.rule.normalized or (self.rule.unbounded and self.top_k_mode == "zero"):
            infinite = "is infinite where the teacher has no probability, as beyond the top k with zero"
            what = infinite if self.rule.normalized else "compares logits, of which a top-k distribution has none"
            raise UsageError(906, self.kind, what, "use kl, jsd or tvd, or no top_k")
        if self.top_k_mode == "bucket" and self.temperature != 1 and not tempered:
            raise UsageError(905, "temperature", "the rest of a stored distribution has no other temperature than 1", "use temperature 1, or renorm")


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
    return TopK(teacher.ids[..., :k], teacher.logp[..., :k], teacher.label_logp)


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
    if isinstance(teacher_logits, Tensor):
        check_vocabulary(student_logits.shape[-1], teacher_has[-1])
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


def chosen(kept: TopK, mask: Tensor) -> TopK:
    """The distributions of some positions, in one row."""
    return TopK(kept.ids[mask], kept.logp[mask], kept.label_logp[mask])


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


def check_vocabulary(student: int, teacher: int) -> None:
    """Refuse another vocabulary.

    Raises:
        UsageError: the numbers of tokens differ.
    """
    if student != teacher:
        hint = "cut what pads them if the tokenizer is the same; uld_loss compares different ones"
        raise UsageError(904, "logits", f"the student's vocabulary is of {student} tokens, the teacher's of {teacher}", hint)
