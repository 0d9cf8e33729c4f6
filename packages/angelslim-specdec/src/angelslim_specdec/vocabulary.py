"""Which of the target's tokens a draft can propose.

Shapes: V vocabulary of the target, Vd of the draft. Token j of the draft is the target's `ids[j]`; drafts and engines store
that as `d2t`, int64 [Vd], offsets: id = j + d2t[j], and as `t2d`, bool [V].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from angelslim_core.errors import ModelError, UsageError


@dataclass(frozen=True)
class Vocabulary:
    """A selection of the target's tokens.

    Args:
        ids: [Vd], int64, ascending.
        size: V.
    """

    ids: Tensor
    size: int

    @property
    def d2t(self) -> Tensor:
        return self.ids - torch.arange(len(self.ids), device=self.ids.device)

    @property
    def t2d(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.bool, device=self.ids.device).index_fill_(0, self.ids, True)

    @classmethod
    def select(cls, counts: Tensor, draft_size: int, always: Iterable[int] = ()) -> Vocabulary:
        """The most frequent tokens; of equally frequent ones, and where too few occur, the lowest ids.

        Args:
            counts: [V], how often each token is to be predicted.
            draft_size: Vd.
            always: ids to keep however rare, such as those that end an answer.

        Raises:
            UsageError: more tokens than there are, or fewer than are always kept.
        """
        size, kept = len(counts), sorted(set(always))
        if kept and not 0 <= kept[0] <= kept[-1] < size:
            raise UsageError(745, "draft vocabulary", f"token {kept[0] if kept[0] < 0 else kept[-1]} is to be kept, and the target has {size} tokens")
        if not max(1, len(kept)) <= draft_size <= size:
            raise UsageError(746, "draft vocabulary", f"{draft_size} tokens", f"at least {max(1, len(kept))}, and at most the target's {size}")
        ranked = counts.to("cpu", torch.float64)
        ranked[kept] = torch.inf
        return cls(ranked.argsort(descending=True, stable=True)[:draft_size].sort().values, size)

    @classmethod
    def from_stored(cls, d2t: Tensor, size: int, where: str, t2d: Tensor | None = None) -> Vocabulary:
        """The selection that a checkpoint stores.

        Raises:
            ModelError: no offsets that ascending ids of the target have, or not the tokens that `t2d` marks.
        """
        if d2t.dtype != torch.int64 or d2t.dim() != 1 or not len(d2t):
            raise ModelError(745, f"{where}: d2t", f"is {d2t.dtype}, {list(d2t.shape)}, and offsets to the target's ids are int64, one a draft token")
        if t2d is not None and (t2d.dtype != torch.bool or tuple(t2d.shape) != (size,)):
            raise ModelError(746, f"{where}: t2d", f"is {t2d.dtype}, {list(t2d.shape)}, and a mark for each of {size} tokens is wanted")
        # compared before anything is added, which could run over
        low, high = int(d2t.min()), int(d2t.max())
        ids = d2t + torch.arange(len(d2t))
        good = low >= 0 and high < size and bool((d2t.diff() >= 0).all()) and int(ids[-1]) < size
        if not good or (t2d is not None and not bool(torch.equal(ids, t2d.nonzero()[:, 0]))):
            raise ModelError(747, f"{where}: d2t", _complaint(d2t, size, t2d), "token j of the draft is the target's j + d2t[j], ascending")
        return cls(ids, size)


def _complaint(d2t: Tensor, size: int, t2d: Tensor | None) -> str:
    absolute = bool((d2t.diff() > 0).all()) and int(d2t.min()) >= 0 and int(d2t.max()) < size
    if absolute and (t2d is None or torch.equal(d2t, t2d.nonzero()[:, 0])):
        return "holds ids of the target, where offsets are wanted"
    if t2d is not None and int(t2d.sum()) != len(d2t):
        return f"has {len(d2t)} tokens, and t2d marks {int(t2d.sum())}"
    return f"gives no ascending ids of a target of {size} tokens" + (" that t2d marks" if t2d is not None else "")
