"""How far a student's hidden states are from its teacher's, and what makes their widths equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .losses import Sums, check_positions, wide


def hs_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Sums:
    """Squared differences, the mean over the width.

    Args:
        student, teacher: [..., D], of which only the student's get a gradient.
        mask: [...], which positions count.

    Returns:
        Sum over positions that count, and their number: its mean is the sum of squares over tokens * D.

    Raises:
        UsageError: shapes differ.
    """
    ours, theirs = _chosen(student, teacher, mask)
    return _sums((ours - theirs).square().mean(-1))


def hs_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Sums:
    """1 - cosine, as `hs_mse`."""
    ours, theirs = _chosen(student, teacher, mask)
    return _sums(1 - torch.cosine_similarity(ours, theirs, -1))


def _chosen(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    check_positions(student.shape, teacher.shape, mask[..., None].expand(*mask.shape, student.shape[-1]), None)
    mask = mask.bool()
    ours = wide(student[mask])
    return ours, teacher.detach()[mask].to(ours.dtype)


def _sums(each: Tensor) -> Sums:
    return Sums(each.sum(), each.new_full((), len(each)))


class Widths(nn.Module):
    """Learned linear maps from a student's hidden states to its teacher's, one a pair of layers; none where the widths are equal.

    Args:
        student, teacher: widths of the states of each pair.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(student, teacher, strict=True)
        self.maps = nn.ModuleList(nn.Identity() if s == t else nn.Linear(s, t, bias=False) for s, t in pairs)

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Of each pair, the student's states [..., D] in the teacher's width."""
        return [to(x.to(to.weight.dtype) if isinstance(to, nn.Linear) else x) for to, x in zip(self.maps, states, strict=True)]
