"""Proposes what most often followed the longest runs that the row has seen before; no model.

Source: SuffixDecoding, arXiv:2411.04975.
"""

from __future__ import annotations

from .lookup import Lookup


class _Node:
    """A run of tokens: how often it came, and what followed."""

    __slots__ = ("after", "count")

    def __init__(self) -> None:
        self.count = 0
        self.after: dict[int, _Node] = {}


class _Trie:
    """All runs of one row up to a depth, with the ones that its end is part of."""

    def __init__(self, depth: int) -> None:
        self._depth, self._root = depth, _Node()
        self._open: list[_Node] = []  # the node of each run that ends with the last token, the longest first

    def add(self, token: int) -> None:
        grown = []
        for node in [*self._open, self._root]:
            found = node.after.get(token)
            if found is None:
                found = node.after[token] = _Node()
            found.count += 1
            grown.append(found)
        self._open = grown[-self._depth :]

    def propose(self, k: int, factor: float, least: float) -> list[int]:
        best: list[int] = []
        best_score = 0.0
        length = len(self._open)
        for node in self._open:
            if node.after:
                found, score = self._follow(node, min(k, int(factor * length)), least)
                if score > best_score:
                    best, best_score = found, score
            length -= 1
        return best

    @staticmethod
    def _follow(node: _Node, most: int, least: float) -> tuple[list[int], float]:
        """The likeliest tokens after a run while all of them together have probability `least`, and how many of them to expect."""
        tokens: list[int] = []
        score, probability = 0.0, 1.0
        while len(tokens) < most and node.after:
            total = sum(n.count for n in node.after.values())
            token, following = max(node.after.items(), key=lambda item: item[1].count)
            probability *= following.count / total
            if probability < least:
                break
            tokens.append(token)
            score += probability
            node = following
        return tokens, score


class Suffix(Lookup):
    """Of all runs that end the row and came before, follows the one that promises the most tokens.

    Args:
        depth: longest run that is kept.
        factor: tokens proposed for each token that matches, at most.
        least: probability of all proposed tokens together, counted from what followed before.
    """

    def __init__(self, depth: int = 24, factor: float = 1.0, least: float = 0.1) -> None:
        super().__init__()
        self._depth, self._factor, self._least = depth, factor, least

    def history(self) -> _Trie:
        return _Trie(self._depth)

    def ahead(self, row: _Trie, k: int) -> list[int]:
        return row.propose(k, self._factor, self._least)
