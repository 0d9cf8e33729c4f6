"""Batches of tokens with what the target made of them: computed at each step, kept in memory, or read from shards.

Shapes: B rows, T tokens, n tapped layers, H hidden of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from angelslim_core.calibration.packing import Row, stack
from angelslim_core.device import free_ram_bytes, to_host
from angelslim_core.products import products

from ..drafts.base import Batch

if TYPE_CHECKING:
    from ..data.shards import Shards
    from ..target import Target

Features = tuple[Tensor, Tensor]
Where = Literal["device", "host", "nowhere"]
_SHARE = 0.5  # of free memory that features may take


class Source:
    """Rows and their features.

    Args:
        rows: all there are.
        read: read(numbers) -> aux [T, n H] and final [T, H] of each row.
        device, dtype: of the batches.
        keep: where the features of rows that were read once stay.
    """

    def __init__(
        self, rows: Sequence[Row], read: Callable[[Sequence[int]], list[Features]], device: torch.device, dtype: torch.dtype, keep: Where = "nowhere"
    ) -> None:
        self.rows, self.device, self.dtype, self.keep = rows, device, dtype, keep
        self._read = read
        self._kept: dict[int, Features] = {}

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Rows as a batch, padded to the longest."""
        tokens = stack([self.rows[i] for i in numbers], 64 if self.device.type == "cuda" else 1, self.device)
        found = self.features(numbers)
        aux, final = (self._joined([f[part] for f in found], tokens.ids.shape) for part in (0, 1))
        return Batch(tokens.ids, tokens.loss_mask, tokens.documents, tokens.positions, aux, final)

    def features(self, numbers: Sequence[int]) -> list[Features]:
        """Of rows; of none where processes that read together lack some and this one does not."""
        missing = [i for i in dict.fromkeys(numbers) if i not in self._kept]
        found = dict(zip(missing, self._read(missing), strict=True))
        if self.keep == "device":
            self._kept |= found
        elif self.keep == "host":
            self._kept |= {i: (to_host(aux), to_host(final)) for i, (aux, final) in found.items()}
        return [found[i] if i in found else self._kept[i] for i in numbers]

    def _joined(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        out = torch.zeros(*shape, parts[0].shape[-1], dtype=self.dtype, device=self.device)
        for i, part in enumerate(parts):
            out[i, : len(part)].copy_(part, non_blocking=True)
        return out


def computed(target: Target, rows: Sequence[Row], layer_ids: Sequence[int]) -> Callable[[Sequence[int]], list[Features]]:
    """What reads rows' features by running the target, in the target's dtype."""

    def read(numbers: Sequence[int]) -> list[Features]:
        if not numbers:
            return []
        chosen = [rows[i] for i in numbers]
        tokens = stack(chosen, 64 if target.device.type == "cuda" else 1, target.device)
        with products(target.device.type):
            aux, final = target.features(tokens.ids, layer_ids, tokens.positions, tokens.documents)
        return [(aux[i, : len(row)].clone(), final[i, : len(row)].clone()) for i, row in enumerate(chosen)]

    return read


def stored(shards: Shards) -> Callable[[Sequence[int]], list[Features]]:
    """What reads rows' features from shards, in the dtype they were written in."""
    return lambda numbers: [shards.features(i) for i in numbers]


def where_to_keep(rows: Sequence[Row], width: int, dtype: torch.dtype, device: torch.device, processes: int = 1) -> tuple[Where, int]:
    """Where features of `width` numbers a token fit, and the bytes they take.

    Args:
        processes: that share the machine's memory; each comes to keep all rows, which every epoch deals out anew.
    """
    nbytes = sum(map(len, rows)) * width * dtype.itemsize
    if device.type == "cuda" and nbytes < _SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device", nbytes
    return "host" if nbytes * processes < _SHARE * free_ram_bytes() else "nowhere", nbytes
