"""What a draft can say of the thought it is drafting, beside tokens: how sure its answer is, how far it has come, how much is left.

Each signal is one more row of the draft's `fc`, read where the target's features are. The original trains them on thoughts that were
cut and answered again, by code that is not published. Here data as they are give the labels: a thought is what an answer holds before
the token that closes it, or where there is none the answer up to its end; answers that were cut off say nothing.

Shapes: B sequences, T tokens, L = B T, N rows with labels, n signals, R answers, V vocabulary.
Source: SpecExit, arXiv:2509.24248.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..training.losses import CHUNK_ELEMENTS
from .base import Batch, Heads
from .ttt import segments

Signal = Literal["confidence", "progress", "remain"]
SIGNALS: tuple[Signal, ...] = get_args(Signal)
# what a term weighs beside the draft's own loss, our choice: makes it about .1 before anything is learnt
WEIGHTS = {"confidence": 0.1, "progress": 1.0, "remain": 0.01}
# e to this is more tokens than there are
_MOST = 20.0


def read(raw: Tensor, signals: Sequence[str]) -> Tensor:
    """Confidence and progress in 0 .. 1 and remaining tokens, [..., n], fp32, of the rows' products [..., n]."""
    z = raw.float()
    return torch.stack([z[..., i].clamp(max=_MOST).exp() if name == "remain" else z[..., i].sigmoid() for i, name in enumerate(signals)], -1)


@dataclass(frozen=True)
class Labels:
    """What rows of a batch should say.

    Args:
        rows: [N], int64, of all L.
        confidence: [N], fp32: how likely the target finds the tokens behind the thought, or where there is none those behind the
            row, by their geometric mean; nan where there are none.
        progress: [N], fp32, in 0 .. 1: the share of the thought that the row ends.
        remain: [N], fp32: tokens of it that are still to come.
    """

    rows: Tensor
    confidence: Tensor
    progress: Tensor
    remain: Tensor


@dataclass(frozen=True)
class Answers:
    """Where a batch's answers lie, in positions of L.

    Args:
        number: [L], int64: of the answer that a token is in; -1: it is in none.
        first, last: [R]: first and last token.
        stop: [R]: token that closes the thought, or the answer's last.
        is_thought: [R], bool: whether there is one.
        complete: [R], bool: whether the token at `stop` is really the end.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    stop: Tensor
    is_thought: Tensor
    complete: Tensor

    @property
    def labelled(self) -> Tensor:
        """[L], bool: tokens of thoughts, or of answers without, before their ends."""
        at = self.number.clamp(min=0)
        place = torch.arange(len(self.number), device=self.number.device)
        return (self.number >= 0) & self.complete[at] & (place < self.stop[at]) if len(self.first) else self.number >= 0


def answers(ids: Tensor, spoken: Tensor, segment: Tensor, thought_end: int, answer_ends: Sequence[int]) -> Answers:
    """
    Args:
        ids, spoken, segment: [L]: tokens, whether they are an answer's, and numbers of documents' runs.
        thought_end: token that closes a thought; -1: there is none.
        answer_ends: tokens that end an answer.
    """
    place = torch.arange(len(ids), device=ids.device)
    joined = spoken[1:] & spoken[:-1] & (segment[1:] == segment[:-1])  # with the token before
    starts, ends = spoken.clone(), spoken.clone()
    starts[1:] &= ~joined
    ends[:-1] &= ~joined
    number = torch.where(spoken, starts.cumsum(0) - 1, -1)
    first, last = place[starts], place[ends]
    closes = spoken & (ids == thought_end)
    stop = torch.full_like(first, len(ids)).scatter_reduce_(0, number[closes], place[closes], "amin")
    is_thought = stop < len(ids)
    complete = is_thought | torch.isin(ids[last], torch.tensor(list(answer_ends), dtype=ids.dtype, device=ids.device))
    return Answers(number, first, last, torch.where(is_thought, stop, last), is_thought, complete)


@torch.no_grad()
def labels(batch: Batch, heads: Heads, thought_end: int, answer_ends: Sequence[int], *, confidence: bool = True) -> Labels:
    """Of a batch's rows, by position and by what the target made of the text.

    Args:
        confidence: whether it is wanted, which takes the target's head; else it is nan.
    """
    ids, segment = batch.ids.flatten(), segments(batch.documents).flatten()
    spoken = (batch.loss_mask & (batch.documents >= 0)).flatten()
    found = answers(ids, spoken, segment, thought_end, answer_ends)
    rows = found.labelled.nonzero()[:, 0]
    of = found.number[rows]
    done, length = rows - found.first[of] + 1, found.stop[of] - found.first[of]
    sure = torch.full_like(done, torch.nan, dtype=torch.float32)
    if confidence and len(rows):
        # sums of the tokens' log-probabilities up to each place; no token of a thought is asked for, nor one that begins a document
        inner = torch.where(found.is_thought, found.stop, found.first)[found.number.clamp(min=0)]
        told = spoken & (torch.arange(len(ids), device=ids.device) > inner)
        logs = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        logs[told] = _log_probabilities(batch.final.flatten(0, 1), ids, told.nonzero()[:, 0], heads).double()
        total, last = logs.cumsum(0), found.last[of]
        behind = torch.where(found.is_thought[of], found.stop[of], rows)
        sure = ((total[last] - total[behind]) / (last - behind)).exp().float()  # 0 / 0 is nan
    return Labels(rows, sure, done / length, (length - done).float())


def _log_probabilities(final: Tensor, ids: Tensor, at: Tensor, heads: Heads) -> Tensor:
    """[N], fp32: what the target gives the tokens at positions [N], each from the row before it."""
    found = [torch.zeros(0, device=final.device)]
    for part in at.split(max(1, CHUNK_ELEMENTS // len(heads.head))):
        logits = heads.logits(final[part - 1]).float()
        found.append(logits.gather(1, ids[part, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(found)


def losses(raw: Tensor, told: Labels, signals: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and weights [n] of the terms: cross-entropy for confidence, squared error for progress, of logarithms for what remains.

    Args:
        raw: [N, n], products of the labels' rows.
    """
    sums, counts = [], []
    for z, name in zip(raw.float().unbind(-1), signals, strict=True):
        if name == "confidence":
            known = ~told.confidence.isnan()
            terms = functional.binary_cross_entropy_with_logits(z[known], told.confidence[known], reduction="none")
        elif name == "progress":
            terms = (z.sigmoid() - told.progress) ** 2
        else:  # log(1 + exp(z)) is that of what is read
            terms = (functional.softplus(z) - told.remain.log1p()) ** 2
        sums.append(terms.sum())
        counts.append(len(terms))
    device = raw.device
    return torch.stack(sums), torch.tensor(counts, dtype=torch.float32, device=device), torch.tensor([WEIGHTS[s] for s in signals], device=device)


def any_labels(rows: Sequence[Any], thought_end: int, answer_ends: Sequence[int]) -> bool:
    """Whether any of the rows of training (`calibration.packing.Row`) has a thought or an answer that ends."""
    return any(bool(answers(r.ids, r.loss_mask, segments(r.documents[None])[0], thought_end, answer_ends).labelled.any()) for r in rows)
