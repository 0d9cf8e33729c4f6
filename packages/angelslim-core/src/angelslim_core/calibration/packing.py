"""Documents side by side in rows of nearly one length, so that little of a batch is padding.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .spans import Document

FEWEST_ROWS = 8  # small data are spread over so many rows where documents allow it, or an epoch would be a step or two
_LEAST_SPOKEN = 2  # tokens of answers; one alone has nothing to be predicted from


@dataclass(frozen=True)
class Row:
    """Documents of one row.

    Args:
        ids: [T], int64.
        loss_mask: [T], bool.
        documents: [T], int64, from 0.
        positions: [T], int64, within the document.
    """

    ids: Tensor
    loss_mask: Tensor
    documents: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Tokens:
    """Rows of a batch, padded on the right: [B, T] each, as in `drafts.base.Batch`."""

    ids: Tensor
    loss_mask: Tensor
    documents: Tensor
    positions: Tensor


def cut(documents: Iterable[Document], length: int) -> tuple[list[Document], int]:
    """Documents of at most `length` tokens, and how many were left out, since too little of an answer remains."""
    found, dropped = [], 0
    for document in documents:
        short = Document(document.ids[:length], document.mask[:length])
        if sum(short.mask[1:]) < _LEAST_SPOKEN:
            dropped += 1
        else:
            found.append(short)
    return found, dropped


def pack(documents: Sequence[Document], length: int, seed: int = 0) -> list[Row]:
    """Rows of at most `length` tokens; the longest documents find their places first, then rows are shuffled."""
    longest = max((len(d.ids) for d in documents), default=0)
    room = min(length, max(longest, -(-sum(len(d.ids) for d in documents) // FEWEST_ROWS)))
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -len(documents[i].ids))
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in order:
        size = len(documents[i].ids)
        at = bisect_left(free, (size, -1))
        left, row = free.pop(at) if at < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(free, (left - size, row))
    random.Random(seed + 1).shuffle(rows)
    return [row_of([documents[i] for i in row]) for row in rows]


def row_of(documents: Sequence[Document]) -> Row:
    """Documents side by side."""
    sizes = torch.tensor([len(d.ids) for d in documents])
    return Row(
        torch.tensor([i for d in documents for i in d.ids], dtype=torch.int64),
        torch.tensor([m for d in documents for m in d.mask], dtype=torch.bool),
        torch.repeat_interleave(torch.arange(len(documents)), sizes),
        torch.cat([torch.arange(int(n)) for n in sizes]),
    )


def stack(rows: Sequence[Row], multiple: int = 1, device: torch.device | str = "cpu") -> Tokens:
    """A batch, as long as its longest row, rounded up to a multiple."""
    width = -(-max(map(len, rows)) // multiple) * multiple

    def joined(name: str, padding: int) -> Tensor:
        parts = [getattr(row, name) for row in rows]
        out = torch.full((len(rows), width), padding, dtype=parts[0].dtype)
        for i, part in enumerate(parts):
            out[i, : len(part)] = part
        return out.to(device, non_blocking=True)

    return Tokens(joined("ids", 0), joined("loss_mask", 0), joined("documents", -1), joined("positions", 0))


def counts(rows: Iterable[Row], vocabulary: int) -> Tensor:
    """[V], how often each token is to be predicted."""
    found = torch.zeros(vocabulary, dtype=torch.int64)
    for row in rows:
        found += torch.bincount(row.ids[row.loss_mask], minlength=vocabulary)
    return found


class Order:
    """Which rows a step takes: each epoch all of them, in an order of its own.

    Args:
        batch: rows a batch over all processes; more than there are become as many.
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rows, self.batch, self._seed = rows, min(batch, rows), seed
        self._epoch, self._order = -1, list[int]()

    def numbers(self, batch: int) -> list[int]:
        """Rows of a batch, counted from the training's first."""
        return [self._at(n) for n in range(batch * self.batch, (batch + 1) * self.batch)]

    def _at(self, n: int) -> int:
        epoch, at = divmod(n, self.rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(self.rows))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self._order[at]


def chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive parts."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
