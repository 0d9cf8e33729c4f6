"""Kinds of losses between distributions, each a function of two log-probabilities, and the rule that all follow.

The temperature T divides the logits of both sides, and the loss is multiplied by T squared, so that gradients keep their size.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from angelslim_core.errors import UsageError

# stands for the logarithm of zero: its exp is zero, and unlike -inf no difference or product of it is NaN
NOTHING = -1e30


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
