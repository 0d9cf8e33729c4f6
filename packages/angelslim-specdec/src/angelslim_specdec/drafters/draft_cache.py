"""Keys and values of a draft of one layer, of which only those made from the target's features last.

Shapes: B rows, S slots, T tokens, h heads of queries, g of keys and values, D of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Visible
from ..kernels.verify_attention import VERIFY_ATTENTION


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
        self._rows = torch.arange(batch, device=like.device)[:, None]
        self._slots = torch.arange(capacity + 1, device=like.device)
        self._bound = None if static else 0

    def write(self, offset: int, keys: Tensor, values: Tensor) -> None:
        """Store [B, g, T, D] at `lengths + offset` and on; what finds no slot goes to the last one, which is never seen."""
        if self._bound is not None and len(self.lengths) == 1 and self._bound + offset + keys.shape[2] < self.shape[2]:
            where = slice(self._bound + offset, self._bound + offset + keys.shape[2])
            self._keys[:, :, where], self._values[:, :, where] = keys, values
            return
        slots = (self.lengths[:, None] + self._slots[: keys.shape[2]] + offset).clamp(max=self.shape[2] - 1)
        self._keys[self._rows, :, slots] = keys.transpose(1, 2)
        self._values[self._rows, :, slots] = values.transpose(1, 2)

    def attend(self, q: Tensor, ahead: int, among: Tensor | None = None) -> Tensor:
        """What queries [B, h, T, D] find in the slots before `lengths + ahead`, [B, h, T, D].

        Args:
            among: [B, T, ahead], bool: which of the slots from `lengths` on each sees; None: all, there being one query.
        """
        assert among is not None or q.shape[2] == 1
        stop = self.shape[2] if self._bound is None else self._bound + ahead
        visible = Visible(self.lengths + (ahead - 1) if among is None else self.lengths, self._slots[: q.shape[2]], among)
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
        self._rows, self.shape = self._rows[: len(rows)], (len(rows), *self.shape[1:])
        self._measure()

    def _measure(self) -> None:
        if self._bound is not None:  # only where there is no device to wait for
            self._bound = int(self.lengths.max()) if len(self.lengths) else 0
