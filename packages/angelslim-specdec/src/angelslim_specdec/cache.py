"""Keys and values of a target in slots that never move: row b's position t is slot t, whatever other rows have.

Shapes: B rows, S slots, T tokens of a call, H heads of keys, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .dcut import Line
from .kernels.tree import KEEP_PATH, Stored


class SlotCache:
    """What transformers' layers call `cache`. Slots from a row's length on hold anything, and nothing reads them.

    Args:
        batch: rows.
        capacity: slots a row, tokens under verification included.
        static: attend to all slots, so that shapes never change; else to those up to the longest row.

    Attributes:
        lengths: [B], int64: confirmed slots of each row.
        bound: the longest row as the host knows it; None: it does not.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device | str, *, static: bool = False) -> None:
        self.capacity = -(-capacity // 16) * 16  # masks are read in aligned pieces
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.bound: int | None = None if static else 0
        self._rows = torch.arange(batch, device=device)[:, None]
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._all: Stored | None = None
        self._slots: Tensor | int = 0
        self._of = self._rows  # row of each slot
        self._prompts: Tensor | None = None
        self._new = 0

    def begin(self, tokens: int, rows: Tensor | None = None, line: Line | None = None) -> None:
        """Called before a forward pass.

        Args:
            tokens: T, new ones of each row.
            rows: [G]: these rows get whole prompts, from slot 0 on; None: all rows, behind what they have.
            line: of the new tokens those that come, in which order; None: all, in their rows.

        Raises:
            UsageError: there is no room.
        """
        if tokens + (self.bound or 0 if rows is None else 0) > self.capacity:
            raise UsageError(707, "cache", f"{tokens} tokens more than {self.bound or 0} do not fit into {self.capacity} slots")
        self._prompts, self._new = rows, tokens
        if rows is None:
            if line is None and self.bound is not None and len(self.lengths) == 1:
                self._slots = self.bound
                return
            slots = self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)
            self._of, self._slots = (self._rows, slots) if line is None else (line.line(self._rows.expand_as(slots)), line.line(slots))

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, D] of the new tokens, or [1, H, N, D] in a line; returns [B, H, S, D], what these may attend to."""
        if layer not in self._stored:
            batch = len(self.lengths)
            self._all = None
            self._stored[layer] = tuple(x.new_zeros(batch, x.shape[1], self.capacity, x.shape[3]) for x in (key, value))  # type: ignore[assignment]
        stored = self._stored[layer]
        if self._prompts is not None:
            for whole, new in zip(stored, (key, value), strict=True):
                whole[self._prompts, :, : self._new] = new
            return key, value
        for whole, new in zip(stored, (key, value), strict=True):
            if isinstance(self._slots, int):
                whole[:, :, self._slots : self._slots + self._new] = new
            else:
                whole[self._of, :, self._slots] = new.transpose(1, 2)
        return self.seen(layer)

    def slots_of(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """A layer's keys and values [B, H, S, D], for callers that store the new ones behind `lengths` themselves; None: leave it to `update`."""
        plain = self._prompts is None and self._of is self._rows and not isinstance(self._slots, int)
        return self._stored.get(layer) if plain else None

    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that new tokens may attend to, once they are stored."""
        seen = self.capacity if self.bound is None else self.bound + self._new
        keys, values = self._stored[layer]
        return keys[:, :, :seen], values[:, :, :seen]

    def get_seq_length(self, *_: Any) -> int:
        """transformers may ask, to make positions that it is given."""
        return 0

    def fill(self, lengths: Tensor, rows: Tensor) -> None:
        """Rows [G] now have prompts of lengths [G]."""
        self.lengths[rows] = lengths
        self._measure()

    def commit(self, counts: Tensor, path: Tensor | None = None) -> None:
        """Keep of the tokens of the last call the first, and those accepted after it.

        Args:
            counts: [B], int64: how many stay, the first one counted; 0 leaves the row as it was.
            path: [B, D], int64: which of the others, from 0, each further one is, -1 behind them; None: they stand in order.
        """
        if path is not None:
            if self._all is None:  # once for all rounds: a graph is captured after a round that was run for real
                self._all = Stored.of([x for pair in self._stored.values() for x in pair])
            KEEP_PATH(self._all, self.lengths, path)
        self.lengths += counts
        self._measure()

    def clear(self) -> None:
        """All rows are empty again, in the same memory."""
        self.lengths.zero_()
        self._measure()

    def _measure(self) -> None:
        if self.bound is not None:
            self.bound = int(self.lengths.max())
