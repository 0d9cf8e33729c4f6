"""Proposes what followed the last time the same few tokens stood there; no model."""

from __future__ import annotations

from .lookup import Lookup


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


class Ngram(Lookup):
    """Longest match of the last tokens earlier in the row, the latest of several; proposes what followed it.

    Args:
        longest: tokens that are compared at most.
        shortest: below this nothing is proposed.
    """

    def __init__(self, longest: int = 5, shortest: int = 2) -> None:
        super().__init__()
        self._range = shortest, longest

    def history(self) -> _History:
        return _History(*self._range)

    def ahead(self, row: _History, k: int) -> list[int]:
        return row.propose(k)
