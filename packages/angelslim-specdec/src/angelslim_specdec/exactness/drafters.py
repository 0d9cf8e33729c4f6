"""Drafters that the kit makes itself: they know what is right, or what is probable, as much as a check wants them to.

Shapes: B rows, K proposed tokens, V vocabulary, Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..drafters.base import Drafter, Proposal, Warp
from ..verification import draw


class Oracle(Drafter):
    """Proposes what the target is going to say, but for a mistake at every `wrong`-th token; 0: none, 1: nothing but mistakes.

    Args:
        answers: prompt -> its continuation.
        tree: beside each right token a wrong one, which comes first and has children of its own.
    """

    reads_host = True

    def __init__(self, answers: Mapping[tuple[int, ...], Sequence[int]], vocabulary: int, wrong: int = 0, tree: bool = False) -> None:
        self._answers, self._vocabulary, self._wrong, self._tree = answers, vocabulary, wrong, tree

    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        self._prompts = [tuple(row[:n]) for row, n in zip(prompts.tolist(), lengths.tolist(), strict=True)]
        self._seen = [1 - len(p) for p in self._prompts]  # the first token observed is the prompt's second

    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        self._seen = [seen + n for seen, n in zip(self._seen, counts.tolist(), strict=True)]

    def size(self, k: int) -> int:
        return 2 * k if self._tree else k

    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        rows = []
        for prompt, seen in zip(self._prompts, self._seen, strict=True):
            right = [*self._answers[prompt][seen : seen + k], *[0] * k][:k]
            rows.append([(t + 1) % self._vocabulary if self._wrong and (seen + at) % self._wrong == 0 else t for at, t in enumerate(right)])
        tokens = torch.tensor(rows)
        if not self._tree:
            return Proposal(tokens)
        beside = (tokens + 1) % self._vocabulary
        number = 2 * torch.arange(k)
        parents = torch.stack([number - 1, number - 1], 1).flatten().expand(len(rows), -1)  # both follow the right one, which is odd
        return Proposal(torch.stack([beside, tokens], 2).flatten(1), parents=parents)


class Table(Drafter):
    """Draws each token from a table of what follows what; without uniforms it takes the most probable.

    Args:
        logits: [V, Vd], fp32.
        columns: [Vd], int64: the target's id of each column; None: all V in order.
        tree: proposes the two most probable tokens, and what is most probable after each of them; two levels, whatever k.
        stated: temperature at which q is stated, if not the one it was drawn at.
    """

    def __init__(self, logits: Tensor, columns: Tensor | None = None, tree: bool = False, stated: float | None = None) -> None:
        self._logits, self._columns, self._tree, self._stated = logits, columns, tree, stated

    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        self._warp, self._last = warp, torch.zeros(len(prompts), dtype=torch.int64)

    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        last = tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        self._last = torch.where(counts > 0, last, self._last)

    def size(self, k: int) -> int:
        return 4 if self._tree else k

    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        if self._tree:
            return self._propose_tree(k)
        q_of = self._logits.softmax(-1) if uniforms is None else self._warp(self._logits)
        stated = q_of if self._stated is None else Warp(self._stated)(self._logits)
        token, tokens, q = self._last, [], []
        for at in range(k):
            column = q_of[token].argmax(-1) if uniforms is None else draw(q_of[token], uniforms[:, at])
            q.append(stated[token])
            token = column if self._columns is None else self._columns[column]
            tokens.append(token)
        confidence = torch.stack([self._logits.softmax(-1)[t].amax(-1) for t in [self._last, *tokens[:-1]]], 1)
        return Proposal(torch.stack(tokens, 1), None if uniforms is None else torch.stack(q, 1), self._columns, confidence=confidence)

    def _propose_tree(self, k: int) -> Proposal:
        ids = self._columns if self._columns is not None else torch.arange(self._logits.shape[1])
        first = ids[self._logits[self._last].topk(2).indices]
        second = ids[self._logits[first].argmax(-1)]
        parents = torch.tensor([-1, -1, 0, 1]).expand(len(first), -1)
        return Proposal(torch.cat([first, second], 1), parents=parents)


class Spy(Drafter):
    """Another drafter, all of whose observations are kept, so that a fresh one can be told the same at once.

    Args:
        stale: from its second round on it observes the features of the round before.
    """

    def __init__(self, inner: Drafter, stale: bool = False) -> None:
        self.inner, self._stale = inner, stale
        self.layer_ids, self.reads_host = inner.layer_ids, inner.reads_host

    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        self.begun = (prompts.clone(), lengths.clone(), capacity, warp)
        self.told: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.proposals: list[tuple[int, Proposal]] = []
        self.inner.start(prompts, lengths, capacity, warp)

    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        self.told.append((tokens.clone(), None if aux is None else aux.clone(), counts.clone()))
        if self._stale and len(self.told) > 2 and aux is not None:
            before = self.told[-2][1]
            assert before is not None
            aux = before if before.shape == aux.shape else aux.roll(1, 1)
        self.inner.observe(tokens, aux, counts)

    def size(self, k: int) -> int:
        return self.inner.size(k)

    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        proposal = self.inner.propose(k, uniforms)
        self.proposals.append((len(self.told), Proposal(proposal.tokens.clone(), confidence=proposal.confidence, counts=proposal.counts)))
        return proposal

    def fresh(self, other: Drafter, k: int) -> Proposal:
        """What another drafter proposes that is told all of it in one call, up to the last proposal."""
        told = self.told[: self.proposals[-1][0]]
        counts = torch.stack([c for _, _, c in told]).sum(0)
        width = int(counts.max())
        tokens = torch.zeros(len(counts), width, dtype=torch.int64)
        aux = None if told[0][1] is None else told[0][1].new_zeros(len(counts), width, told[0][1].shape[2])
        for row in range(len(counts)):
            at = 0
            for part, features, count in told:
                n = int(count[row])
                tokens[row, at : at + n] = part[row, :n]
                if aux is not None and features is not None:
                    aux[row, at : at + n] = features[row, :n]
                at += n
        other.start(*self.begun)
        other.observe(tokens, aux, counts)
        return other.propose(k)


class Listening(Drafter):
    """Another drafter, whose proposals are kept with what became of them; never in a graph, where nobody could listen.

    Chains only: what trees propose counts as not proposed.
    """

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.layer_ids, self.reads_host = inner.layer_ids, inner.reads_host
        self._rounds: list[Proposal] = []
        self._kept: list[list[int]] = []

    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        self.inner.start(prompts, lengths, capacity, warp)

    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        self.inner.observe(tokens, aux, counts)

    def size(self, k: int) -> int:
        return self.inner.size(k)

    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        proposal = self.inner.propose(k, uniforms)
        parts = {name: getattr(proposal, name) for name in ("q", "columns", "parents", "counts")}
        self._rounds.append(Proposal(proposal.tokens.clone(), **{name: None if part is None else part.clone() for name, part in parts.items()}))
        return proposal

    def hear(self, new: list[list[int]]) -> None:
        """The engine tells how many tokens each row got in a round; the first are of no proposal."""
        self._kept.append([len(row) for row in new])

    def proposed(self, tokens: int, vocabulary: int) -> Tensor:
        """Probabilities [B, N, V], fp32, by which the first N tokens of each row were proposed; 0 where none was."""
        batch, device = len(self._kept[0]), self._rounds[0].tokens.device
        found = torch.zeros(batch, tokens, vocabulary, device=device)
        at = list(self._kept[0])
        for proposal, kept in zip(self._rounds, self._kept[1:], strict=False):
            for row, number in enumerate(kept):
                width = min(number, proposal.tokens.shape[1] if proposal.counts is None else int(proposal.counts[row]), tokens - at[row])
                if proposal.parents is None and width > 0:
                    where = found[row, at[row] : at[row] + width]
                    if proposal.q is None:
                        where.scatter_(1, proposal.tokens[row, :width, None].to(device), 1.0)
                    elif proposal.columns is None:
                        where.copy_(proposal.q[row, :width])
                    else:
                        where[:, proposal.columns] = proposal.q[row, :width]
                at[row] += number
        return found
