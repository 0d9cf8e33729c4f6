"""What drafters without weights share: they read tokens on the host and keep a history for each row."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .base import Drafter, Proposal, Warp


class Lookup(Drafter):
    """Proposes from what each row has said before. A history has `add(token)`."""

    reads_host = True

    def __init__(self) -> None:
        self._rows: list[Any] = []

    @abstractmethod
    def history(self) -> Any:
        """An empty one."""

    @abstractmethod
    def ahead(self, row: Any, k: int) -> list[int]:
        """Up to k tokens that may follow a history."""

    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        self._rows = [self.history() for _ in range(len(prompts))]
        for row, first in zip(self._rows, prompts[:, 0].tolist(), strict=True):
            row.add(first)

    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        for row, new, count in zip(self._rows, tokens.tolist(), counts.tolist(), strict=True):
            for token in new[:count]:
                row.add(token)

    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        rows = [self.ahead(row, k) for row in self._rows]
        counts = torch.tensor([len(row) for row in rows])
        return Proposal(torch.tensor([row + [0] * (k - len(row)) for row in rows], dtype=torch.int64).view(len(rows), k), counts=counts)
