"""Rows to train on and rows held out, and the batches of a step.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from angelslim_core.calibration.packing import Order, Row, cut, pack, row_of, stack
from angelslim_core.calibration.spans import Turns
from angelslim_core.errors import RecipeError, UsageError
from angelslim_core.parallel import Group
from angelslim_core.workdir import sha256

from ..attention import FEWEST, starts_of
from ..fingerprints import sample_key
from ..targets import Batch
from .documents import Count, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Source(Protocol):
    """Where the batches of a training come from."""

    def batch(self, step: int, part: int) -> Batch:
        """This process's rows of a part of a step, on any device; the same ones whenever it is asked."""


@dataclass(frozen=True)
class Rows:
    """Rows of a file.

    Args:
        held_out: rows to evaluate on, none of whose documents are in `train`.
        documents: how many there are, held-out ones among them; `dropped`: left out, since too little that counts remained of them.
        data: sha256 of the file.
    """

    train: list[Row]
    held_out: list[Row]
    documents: int
    dropped: int
    data: str


def prepare(
    path: Path, tokenizer: PreTrainedTokenizerBase, where: str, *, length: int, count: Count = "answers", turns: Turns = "joined", packed: bool = True,
    held_out: float = 0.0, seed: int = 0,
) -> Rows:  # fmt: skip
    """Read, cut and pack a file.

    Args:
        packed: documents share rows of at most `length` tokens; otherwise each is a row of its own.
        held_out: share of the documents, one at least unless it is 0.

    Raises:
        RecipeError: nothing counts in what is left of the documents, or nothing is left to train on.
    """
    whole = read_documents(path, tokenizer, where, length=length, count=count, turns=turns)
    documents, dropped = cut(whole, length)
    if not documents:
        raise RecipeError(914, str(path), f"none of its {len(whole)} documents has a token that counts within {length} tokens", "give a greater length")
    kept = max(1, round(held_out * len(documents))) if held_out else 0
    if kept >= len(documents):
        raise RecipeError(
            915, str(path), f"holds {len(documents)} documents, which leaves none to train on once {kept} are held out", "give more, or held_out: 0"
        )
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    held = set(order[:kept])

    def rows(wanted: bool) -> list[Row]:
        part = [d for i, d in enumerate(documents) if (i in held) == wanted]
        return pack(part, length, seed) if packed and part else [row_of([d]) for d in part]

    return Rows(rows(False), rows(True), len(documents), dropped, sha256(path))


def key_of(row: Row) -> str:
    """Under which a row is known to a cache: `sample_key` of its tokens, and of its documents' lengths where it has several."""
    lengths = torch.bincount(row.documents).tolist()
    return sample_key([*row.ids.tolist(), *([-1, *lengths] if len(lengths) > 1 else [])])


@dataclass(frozen=True)
class Form:
    """What all batches of a training have in common, so that what is compiled for one serves the others.

    Args:
        with_positions: also where no row is shared.
        places: of `attention.starts_of`.
        longest: tokens of a document, at most; 0: those of a batch's longest row.
    """

    with_positions: bool = False
    places: int = FEWEST
    longest: int = 0


def form_of(rows: Sequence[Row], batch: int) -> Form:
    """The form of batches of some of the rows: so many documents, beside padding, as hardly any batch has."""
    sizes = [torch.bincount(row.documents) for row in rows]
    documents = torch.tensor([len(size) + 1.0 for size in sizes])
    if float(documents.max()) <= 2:
        return Form()
    most = float(batch * documents.mean() + 6 * (batch * documents.var(correction=0)).sqrt())
    return Form(True, 32 * (int(most) // 32 + 1), max(int(size.max()) for size in sizes))


def collate(rows: Sequence[Row], multiple: int = 1, form: Form | None = None) -> Batch:
    """A batch on the CPU, as long as its longest row, rounded up to a multiple; positions are left out where no row is shared, unless they are wanted."""
    form = form or Form()
    tokens = stack(rows, multiple)
    labels, counted = torch.zeros_like(tokens.ids), torch.zeros_like(tokens.loss_mask)
    labels[:, :-1] = tokens.ids[:, 1:]
    counted[:, :-1] = tokens.loss_mask[:, 1:] & (tokens.documents[:, 1:] == tokens.documents[:, :-1]) & (tokens.documents[:, 1:] >= 0)
    keys, found = [key_of(row) for row in rows], Batch(tokens.ids, tokens.documents >= 0, labels, counted, [])
    if not form.with_positions and not bool((tokens.documents > 0).any()):
        return replace(found, samples=keys)
    longest = form.longest or tokens.ids.shape[1]
    starts = starts_of(tokens.positions, tokens.documents < 0, longest, form.places)
    return replace(found, samples=keys, positions=tokens.positions, starts=starts, longest=longest)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, without waiting for it; which positions count stays on the host, which chooses by it."""

    def there(tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
        return pinned.to(device, non_blocking=True)

    positions, starts = (None if tensor is None else there(tensor) for tensor in (batch.positions, batch.starts))
    ids, mask, labels = (there(tensor) for tensor in (batch.input_ids, batch.attention_mask, batch.labels))
    return replace(batch, input_ids=ids, attention_mask=mask, labels=labels, positions=positions, starts=starts)


class Supervised:
    """Rows of a file, each epoch all of them in an order of its own.

    Args:
        batch: rows a batch, over all processes; more than there are become as many.
        accumulate: batches a step.

    Raises:
        UsageError: the processes cannot share a batch evenly.
    """

    def __init__(self, rows: Sequence[Row], batch: int, *, accumulate: int = 1, seed: int = 0, group: Group | None = None, multiple: int = 1) -> None:
        self.rows, self.group, self._accumulate, self._multiple = rows, group or Group(), accumulate, multiple
        self.order = Order(len(rows), batch, seed)
        self._form = form_of(rows, self.order.batch // self.group.size)
        if self.order.batch % self.group.size:
            what = f"{self.order.batch} rows a batch cannot be shared by {self.group.size} processes"
            raise UsageError(910, "batch", what, "give a multiple of their number")

    def batch(self, step: int, part: int) -> Batch:
        """This process's rows of a part of a step."""
        numbers = self.order.numbers(step * self._accumulate + part)
        return collate([self.rows[i] for i in numbers[self.group.rank :: self.group.size]], self._multiple, self._form)
