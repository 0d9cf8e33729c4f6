"""Proposes what followed the last time the same few tokens stood there; no model."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Drafter, Proposal, Warp


class _History:
    """Tokens of one row, and where each short run of them last ended."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.tokens: list[int] = []
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}

    def add(self, token: int) -> None:
        end = len(self.tokens)
        for size in self._sizes:  # runs are known once something follows them, so that the last one is never its own match
            if size <= end:
                self._ends[tuple(self.tokens[end - size :])] = end
        self.tokens.append(token)

    def propose(self, k: int) -> list[int]:
        for size in self._sizes:
            at = self._ends.get(tuple(self.tokens[-size:])) if size <= len(self.tokens) else None
            if at is not None:
                found = self.tokens[at : at + k]
                while len(found) < k:  # a run that reaches its own repetition goes on repeating
                    found.append(found[len(found) - (len(self.tokens) - at)])
                return found
        return []


class Ngram(Drafter):
    """Longest match of the last tokens earlier in the row, the latest of several; proposes what followed it.

    Args:
        longest: tokens that are compared at most.
        shortest: below this nothing is proposed.
    """

    reads_host = True

    def __init__(self, longest: int = 5, shortest: int = 2) -> None:
        self._range = shortest, longest
        self._rows: list[_History] = []

    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        self._rows = [_History(*self._range) for _ in range(len(prompts))]
        for row, first in zip(self._rows, prompts[:, 0].tolist(), strict=True):
            row.add(first)

    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        for row, new, count in zip(self._rows, tokens.tolist(), counts.tolist(), strict=True):
            for token in new[:count]:
                row.add(token)

    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        return padded([row.propose(k) for row in self._rows], k)


def padded(rows: list[list[int]], k: int) -> Proposal:
    """A chain for each row, of up to k tokens."""
    counts = torch.tensor([len(row) for row in rows])
    return Proposal(torch.tensor([row + [0] * (k - len(row)) for row in rows], dtype=torch.int64).view(len(rows), k), counts=counts)
