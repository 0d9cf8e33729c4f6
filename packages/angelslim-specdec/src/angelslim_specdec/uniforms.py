"""Random numbers of each row, drawn on the host, so that what a row samples does not depend on its batch or on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1024


class Uniforms:
    """One generator a row; each row's numbers follow each other without gaps, however many are taken at a time.

    Args:
        seeds: one a row.
        salt: makes other numbers of the same seeds.
    """

    def __init__(self, seeds: Sequence[int], salt: int) -> None:
        self._salt, self._at = salt, _BLOCK
        self._generators = [self._generator(seed) for seed in seeds]
        self._drawn = torch.empty(len(seeds), _BLOCK)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed((4 * seed + self._salt) % 2**63)

    def take(self, width: int) -> Tensor:
        """[B, width], fp32 in [0, 1), on the CPU."""
        if width > _BLOCK - self._at:
            left = _BLOCK - self._at
            self._drawn[:, :left] = self._drawn[:, self._at :].clone()
            for row, generator in zip(self._drawn, self._generators, strict=True):
                row[left:] = torch.rand(_BLOCK - left, generator=generator)
            self._at = 0
        self._at += width
        return self._drawn[:, self._at - width : self._at].clone()

    def restart(self, row: int, seed: int) -> None:
        """The row begins anew."""
        self._generators[row] = self._generator(seed)
        self._drawn[row, self._at :] = torch.rand(_BLOCK - self._at, generator=self._generators[row])
