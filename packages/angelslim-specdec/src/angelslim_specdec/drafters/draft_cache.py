"""Keys and values of a draft of one layer, of which only those made from the target's features last.

Shapes: B rows, S slots, T tokens, h heads of queries, g of keys and values, D of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import Visible
from ..kernels import layer as kernels
from ..kernels.verify_attention import MOST_TOKENS, VERIFY_ATTENTION


class DraftCache:
    """Row b's position t is in slot t. What is written behind `lengths` while proposing is overwritten by the next confirmed positions.

    Args:
        capacity: slots a row, those of proposals included; one more takes what falls behind them.
        static: attend to all slots, so that shapes never change; else to those up to the longest row.

    Attributes:
        lengths: [B], int64: confirmed positions of each row.
    """

    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int, like: Tensor, *, static: bool) -> None:
        self.shape = (batch, kv_heads, capacity + 1, head_dim)
        self._keys, self._values = like.new_zeros(self.shape), like.new_zeros(self.shape)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self._all = torch.ones(1, 1, 1, dtype=torch.bool, device=like.device)
        self._rooms: dict[Any, Any] = {}
        self._slots = torch.arange(capacity + 1, device=like.device)
        self._bound = None if static else 0

    def take(self, q: Tensor, k: Tensor, v: Tensor, turns: tuple[Tensor, Tensor], offset: int, level: int | None = None) -> Tensor:
        """Turn queries and keys [B, T, h or g, D], and store the keys with their values at `lengths + offset` and on.

        What finds no slot goes to the last one, which is never seen.

        Args:
            turns: cosine and sine of each position, [P, D].
            level: all are turned by position `lengths + level`; None: each by its slot's.

        Returns:
            queries, [B, h, T, D].
        """
        tokens = q.shape[1]
        if self._bound is not None and len(self.lengths) == 1 and self._bound + offset + tokens < self.shape[2]:  # the host knows where
            first = self._bound + offset if level is None else self._bound + level
            cos, sin = (turn[first : first + (tokens if level is None else 1)] for turn in turns)
            q, k = kernels.TURNED(q, k, cos[None], sin[None])
            where = slice(self._bound + offset, self._bound + offset + tokens)
            self._keys[:, :, where], self._values[:, :, where] = k, v.transpose(1, 2)
            return q
        found: Tensor = kernels.TURN_AND_STORE(q, k, v, *turns, self._keys, self._values, self.lengths, offset, level)
        return found

    def attend(self, q: Tensor, ahead: int, among: Tensor | None = None) -> Tensor:
        """What queries [B, h, T, D] find in the slots before `lengths + ahead`, [B, h, T, D].

        Args:
            among: [B, T, ahead], bool: which of the slots from `lengths` on each sees; None: all, there being one query.
        """
        assert among is not None or q.shape[2] == 1
        stop = self.shape[2] if self._bound is None else self._bound + ahead
        if among is None and 0 < ahead <= MOST_TOKENS:
            among = self._all.expand(len(q), 1, ahead)
        visible = Visible(self.lengths + (ahead - 1) if among is None else self.lengths, self._slots[: q.shape[2]], among, rooms=self._rooms)
        found: Tensor = VERIFY_ATTENTION(q, self._keys[:, :, :stop], self._values[:, :, :stop], visible, q.shape[3] ** -0.5)
        return found

    def confirm(self, counts: Tensor) -> None:
        """The first of those written at offset 0 are certain, [B], int64."""
        self.lengths.add_(counts)
        self._measure()

    def clear(self) -> None:
        """All rows are empty again, in the same memory."""
        self.lengths.zero_()
        self._measure()

    def keep(self, rows: Tensor) -> None:
        """These rows stay, in this order."""
        self._keys, self._values, self.lengths = self._keys[rows], self._values[rows], self.lengths[rows]
        self.shape = (len(rows), *self.shape[1:])
        self._measure()

    def _measure(self) -> None:
        if self._bound is not None:  # only where there is no device to wait for
            self._bound = int(self.lengths.max()) if len(self.lengths) else 0
