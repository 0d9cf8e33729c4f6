"""The decode loop: one engine for plain and for speculative decoding, on CPUs and, in CUDA graphs, on GPUs.

A round lets the drafter propose, verifies in one forward pass of the target, keeps what the rule accepts and one token more,
and tells the drafter. All of it is device work of fixed shape on tensors that stay in place; only drafters that read the
host, and CPUs, have the host in between.

Shapes: B rows, P longest prompt, K tokens of a chain or levels of a tree, N proposed tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .adaptive import Pacing, Round
from .dcut import Line, kept, scores
from .drafters.base import Drafter, Proposal, Warp
from .graphs import Feed, Graphs, Readout, Runner
from .kernels.accept import ACCEPT_GREEDY, ACCEPT_RATIO
from .kernels.settle import SETTLE, joined, note
from .kernels.tree import ACCEPT_TREE
from .prompts import Prompts
from .stops import cut
from .target import Target
from .uniforms import Uniforms
from .verification import draw, match, tree_sample

if TYPE_CHECKING:
    from .spec_exit import Exits
    from .stop_strings import StopStrings

Rule = Literal["auto", "ratio", "match"]
# columns of what a round gives the host, as `kernels.settle` writes them; then come its tokens
ACCEPTED, KEPT, PROPOSED, GOES_ON, TOKENS = range(5)
# salts of `Uniforms`
_FIRST, _PROPOSE, _VERIFY = range(3)
# of scores among a round's results, which are whole numbers
_ONE = 2**30


@dataclass
class Decoded:
    """What a batch became.

    Args:
        tokens: the new ones of each row, a stop token among them.
        rounds: rounds of each row; the forward pass over its prompt is none.
        accepted: proposed tokens that were accepted, of all rows, those behind a stop included.
        drafted: proposed tokens that were verified, of all rows.
        drafts: rounds of rows in which any were proposed.
        by_position: how many were accepted at each position of a chain or level of a tree.
        exited: rows that had a thought cut short by SpecExit; None: it was not asked for.
        prompt_seconds: until the first token of every row.
        seconds: from then on.
    """

    tokens: list[list[int]]
    rounds: list[int]
    accepted: int = 0
    drafted: int = 0
    drafts: int = 0
    by_position: list[int] = field(default_factory=list)
    exited: int | None = None
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def lossless(self) -> bool:
        """Whether these are the target's own words: not where SpecExit may cut them."""
        return self.exited is None

    @property
    def acceptance_length(self) -> float:
        """Tokens a round of a row, the one that the target adds counted: 1 + accepted / rounds."""
        return 1 + self.accepted / sum(self.rounds) if sum(self.rounds) else 1.0


class Engine:
    """Decodes batches of one shape. Keep it to decode several: graphs are captured once.

    Args:
        drafter: None is plain decoding.
        batch: rows.
        capacity: tokens a row may have in all, prompt and new ones.
        k: tokens to propose a round, levels of a tree.
        warp: temperature 0 is greedy.
        rule: how sampled tokens are accepted: "ratio" accepts the most, "match" is lossless for any proposal, "auto" is "ratio".
            Greedy decoding, and trees, have a rule of their own.
        stops: tokens that end an answer.
        pace: changes the number of tokens from round to round, k being the most, and how many of them are verified.
        static: fixed shapes; None: on a GPU.
        runner: how rounds, and prompts, run; None: as graphs on a GPU, if shapes are fixed. The host runs ahead of one that is given.
        exits: ends thoughts early, which is NOT lossless.
        words: strings that end an answer.

    Attributes:
        lag: rounds that the host may begin before it reads the results of one.

    Raises:
        UsageError: k is no number of tokens.
    """

    def __init__(
        self, target: Target, drafter: Drafter | None, batch: int, capacity: int, *, k: int = 5, warp: Warp | None = None, rule: Rule = "auto",
        stops: Sequence[int] = (), pace: Pacing | None = None, static: bool | None = None,
        runner: Runner | None = None, exits: Exits | None = None, words: StopStrings | None = None,
    ) -> None:  # fmt: skip
        if drafter is not None and k < 1:
            raise UsageError(710, "k", f"{k} tokens cannot be proposed", "1 or more")
        self.target, self.drafter, self.batch, self.capacity = target, drafter, batch, capacity
        self.k, self.warp, self.rule, self.pace = 0 if drafter is None else k, warp or Warp(), rule, pace
        self._exits, self._words = exits, words
        device = target.device
        self.static = device.type == "cuda" if static is None else static
        self._size = 0 if drafter is None else drafter.size(k)
        self.slots = capacity + max(self._size, self.k) + 1
        self.cache = target.new_cache(batch, self.slots, static=self.static)
        self._layers = () if drafter is None else drafter.layer_ids
        self._on_host = drafter is not None and drafter.reads_host
        self._stops = torch.tensor(sorted(set(stops)), dtype=torch.int64, device=device)
        self._last, self._remaining = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self._uniforms = {salt: torch.zeros(batch, width, device=device) for salt, width in ((_PROPOSE, self.k), (_VERIFY, self._size + 1))}
        self._scores = slice(TOKENS + self.k + 1, TOKENS + self.k + 1 + (0 if pace is None else self.k))
        self._out = torch.zeros(batch, self._scores.stop, dtype=torch.int64, device=device)
        # proposals of a drafter on the host, where shapes are fixed
        self._tokens, self._counts = torch.zeros(batch, self._size, dtype=torch.int64, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
        fits = self.static and (drafter is None or drafter.graphable or self._on_host)
        graphs = Graphs() if fits and device.type == "cuda" else runner
        self._runner = runner or graphs or (lambda function: function)
        self._prompts = Prompts(target, self.cache, self._layers, capacity, graphs)
        # the host may run ahead where it has no part in a round
        self.lag = 1 if graphs is not None and not self._on_host else 0
        self._rounds: dict[Round, Callable[[], None]] = {}
        # rounds whose results were not read yet and when they began, and when the last ones were read
        self._begun: deque[tuple[Round, float]] = deque()
        self._read = 0.0
        self._readout = Readout(self._out, self.lag + 1)
        self._feeds = {salt: Feed(buffer, self.lag + 2) for salt, buffer in self._uniforms.items()}

    @torch.no_grad()
    def decode(
        self, prompts: Tensor, lengths: Tensor, max_new_tokens: int, seeds: Sequence[int] | None = None, tell: Callable[[list[list[int]]], None] | None = None
    ) -> Decoded:  # fmt: skip
        """Decode one batch to its end.

        Args:
            prompts: [B, P], int64, left-aligned; what follows a prompt is not read.
            lengths: [B], int64, at least 1.
            max_new_tokens: of each row.
            seeds: of each row, to sample with; None: 0, 1...
            tell: called after each round with its new tokens, row by row.

        Raises:
            UsageError: the batch is not of the engine's shape, or a prompt is empty or too long.
        """
        started = time.perf_counter()
        draws = self.draws(range(self.batch) if seeds is None else seeds)
        self.cache.clear()
        aux, followers = self.admit(range(self.batch), prompts, lengths, max_new_tokens, draws)
        if self._exits is not None:
            self._exits.start(prompts, lengths, self._last)
        if self._words is not None:
            self._words.start([ids[:n] for ids, n in zip(prompts.tolist(), lengths.tolist(), strict=True)])
        results = [self._spoken(self._readout.send(self._out)())]
        if tell is not None:
            tell(rows_of(results[0]))
        read = time.perf_counter()
        if goes_on := bool(results[0][:, GOES_ON].any()):
            self._start(prompts, lengths, followers, aux)
        pending: deque[Callable[[], Tensor]] = deque()
        self._begun.clear()
        while goes_on:
            pending.append(self.next_round(draws))
            if len(pending) <= self.lag:
                continue
            results.append(self._spoken(pending.popleft()()))
            goes_on = self._saw(results[-1])
            if tell is not None:
                tell(rows_of(results[-1]))
        decoded = _decoded(torch.stack(results), self.k)
        exited = None if self._exits is None else int((self._exits.cuts > 0).sum())
        return replace(decoded, exited=exited, prompt_seconds=read - started, seconds=time.perf_counter() - read)

    def admit(
        self, rows: Sequence[int], prompts: Tensor, lengths: Tensor, max_new_tokens: int, draws: dict[int, Uniforms]
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """Read prompts into rows, whatever these held, and find the token after each.

        Args:
            rows: G of them.
            prompts: [G, P], int64, left-aligned.
            lengths: [G], int64.

        Returns:
            features of the prompts [G, P, n H], and their tokens but the first, with the new one: [G, P].

        Raises:
            UsageError: a prompt is empty or does not fit, or no tokens are wanted.
        """
        shortest, longest, rows = int(lengths.min()), int(lengths.max()), list(rows)
        if len(prompts) != len(rows) or not 0 < shortest <= longest <= min(self.capacity - max_new_tokens, prompts.shape[1]) or max_new_tokens < 1:
            what = f"{len(prompts)} of {shortest} to {longest} tokens, with {max_new_tokens} new ones, do not fit into {len(rows)} rows of {self.capacity}"
            raise UsageError(711, "prompts", what, "prompts and answers have at least one token")
        device = self.target.device
        prompts, lengths, at = prompts[:, :longest].to(device), lengths.to(device), torch.tensor(rows, device=device)
        step = self._prompts(prompts, lengths, at)
        logits = step.logits[:, 0]
        first = draw(self.warp(logits), draws[_FIRST].take(1)[at.cpu(), 0].to(device)) if draws else logits.argmax(-1)
        kept, ended = cut(first[:, None], torch.ones_like(first), torch.full_like(first, max_new_tokens), self._stops)
        self._last[at] = first
        self._remaining[at] = torch.where(ended, 0, max_new_tokens - kept)
        self._out[at, : TOKENS + 1] = torch.stack([torch.zeros_like(first), kept, torch.zeros_like(first), (~ended).long(), first], 1)
        return step.aux, torch.cat([prompts[:, 1:], first[:, None]], 1).scatter(1, lengths[:, None] - 1, first[:, None])

    def results(self, rows: Sequence[int]) -> Tensor:
        """What the last round, or `admit`, says of rows [G]: [G, `TOKENS` and the tokens], on the host."""
        return self._out[torch.tensor(list(rows), device=self._out.device)].cpu()

    def draws(self, seeds: Sequence[int]) -> dict[int, Uniforms]:
        """Random numbers for rows of these seeds; none where nothing is sampled."""
        return {salt: Uniforms(seeds, salt) for salt in (_FIRST, _PROPOSE, _VERIFY)} if self.warp.temperature > 0 else {}

    def _start(self, prompts: Tensor, lengths: Tensor, followers: Tensor, aux: Tensor | None) -> None:
        if self.drafter is None:
            return
        where = "cpu" if self._on_host else self.target.device
        prompts, lengths, followers = prompts[:, : followers.shape[1]].to(where), lengths.to(where), followers.to(where)
        self.drafter.start(prompts, lengths, self.slots, self.warp)
        self.drafter.observe(followers, aux, lengths)

    def next_round(self, draws: dict[int, Uniforms]) -> Callable[[], Tensor]:
        """Begin a round; what is returned waits for its results."""
        how = Round(self.k)
        if self.pace is not None:
            how = self.pace.next()
            self._begun.append((how, time.perf_counter()))
        k = min(how.k, self.k)
        for salt, feed in self._feeds.items() if draws else ():
            feed.send(draws[salt].take(self._uniforms[salt].shape[1]))
        if self._on_host and not self.static:
            self._round(how)
        else:
            if self._on_host and k:
                assert self.drafter is not None
                proposal = self.drafter.propose(k)
                self._tokens[:, : proposal.tokens.shape[1]].copy_(proposal.tokens)
                self._counts.copy_(torch.full((self.batch,), k) if proposal.counts is None else proposal.counts)
            if how not in self._rounds:
                self._rounds[how] = self._runner(lambda: self._round(how))
            self._rounds[how]()
        return self._readout.send(self._out)

    def _spoken(self, result: Tensor) -> Tensor:
        """A round's results [B, ...] on the host, of which rows keep nothing behind a stop string."""
        if self._words is None:
            return result
        for row, new in enumerate(rows_of(result)):
            if new and (stays := self._words.add(row, new)) is not None:
                result[row, KEPT], result[row, GOES_ON] = stays, 0
                self._remaining[row] = 0
        return result

    def _saw(self, result: Tensor) -> bool:
        """Take note of a round's results [B, ...] on the host; whether any row goes on."""
        if self._on_host and self.drafter is not None:
            self.drafter.observe(result[:, TOKENS:], None, result[:, KEPT])
        if self.pace is not None:
            now, (how, began) = time.perf_counter(), self._begun.popleft()
            took_part = result[result[:, KEPT] > 0]
            of = took_part[:, self._scores].float() / _ONE
            # the host may begin a round while the one before runs
            self.pace.saw(how, now - max(began, self._read), took_part[:, ACCEPTED], took_part[:, PROPOSED].clamp(max=self.k), of)
            self._read = now
        return bool(result[:, GOES_ON].any())

    def _round(self, how: Round) -> None:
        k = min(how.k, self.k)
        proposal = self._proposal(k)
        proposal, line = (proposal, None) if self.pace is None or k == 0 else self._chosen(proposal, how)
        ids = torch.cat([self._last[:, None], proposal.tokens.clamp(min=0)], 1)
        step = self.target.forward(ids, self.cache, self._layers, proposal.parents, line)
        tokens, accepted, following, path = self._accept(step.logits, proposal, k)
        counts, aux = proposal.counts, step.aux
        if path is not None:
            counts = torch.full_like(accepted, proposal.tokens.shape[1]) if counts is None else counts
            if aux is not None:
                rows = torch.nn.functional.pad(path + 1, (1, 0))
                aux = aux.gather(1, rows[..., None].expand(-1, -1, aux.shape[2]))
        if self._exits is None:
            emitted, kept = SETTLE(tokens, accepted, following, counts, self._stops, self._last, self._remaining, self._out)
        else:
            assert aux is not None
            emitted, accepted = self._exits.closing(joined(tokens, accepted, following), accepted)
            kept, ended = self._exits.cut(emitted, aux, *cut(emitted, accepted + 1, self._remaining, self._stops))
            note(emitted, accepted, kept, ended, counts, self._last, self._remaining, self._out)
        self.cache.commit(kept, path)
        if self.drafter is not None and not self._on_host:
            self.drafter.observe(emitted, aux, kept)

    def _proposal(self, k: int) -> Proposal:
        if self.drafter is None or k == 0:
            return Proposal(self._tokens[:, :0])
        if not self._on_host:
            # only the ratio rule wants drawn tokens; the others accept more of the most probable ones
            drawn = self.warp.temperature > 0 and self.rule != "match" and self._size == self.k
            return self.drafter.propose(k, self._uniforms[_PROPOSE][:, :k] if drawn else None)
        if self.static:
            return Proposal(self._tokens[:, :k], counts=self._counts)
        found = self.drafter.propose(k)
        if found.counts is None:
            return found
        most = int(found.counts.max())  # nothing is verified that no row proposed
        return replace(found, tokens=found.tokens[:, :most])

    def _chosen(self, proposal: Proposal, how: Round) -> tuple[Proposal, Line | None]:
        """A proposal without what is not to be verified, and what is in one line; None: nothing is left out."""
        if proposal.parents is not None:
            if how.size is not None:
                raise UsageError(785, "pace", "tokens of a tree are not left out of verification", "let it only change the number of levels")
            self._out[:, self._scores] = _ONE
            return proposal, None
        of, places = scores(proposal, self._remaining > 0), proposal.tokens.shape[1] + 1
        self._out[:, self._scores] = torch.nn.functional.pad((of * _ONE).long(), (0, self.k - of.shape[1]))
        if how.size is None or how.size >= of.numel():
            return proposal, None
        counts = kept(of, how.size)
        line = Line.of(counts, places, how.size)
        return replace(proposal, counts=counts if proposal.counts is None else torch.minimum(counts, proposal.counts)), line

    def _accept(self, logits: Tensor, proposal: Proposal, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Tokens of the chain or of a tree's path [B, N or K], how many are accepted [B], what follows them [B], and which of the tree's they are."""
        tokens, sampled = proposal.tokens, self.warp.temperature > 0
        uniforms = self._uniforms[_VERIFY]
        if proposal.parents is not None:
            if sampled:
                path, accepted, following = tree_sample(self.warp(logits), tokens, proposal.parents, uniforms[:, : tokens.shape[1] + 1], k)
                tokens = tokens.gather(1, path.clamp(min=0))
            else:
                path, accepted, following, tokens = ACCEPT_TREE(logits, tokens, proposal.parents, k)
        else:
            path, size = None, tokens.shape[1]
            if not sampled:
                accepted, following = ACCEPT_GREEDY(logits, tokens, proposal.counts)
            elif self.rule == "match":
                accepted, following = match(self.warp(logits), tokens, uniforms[:, : size + 1], proposal.counts)
            else:  # the last draw is the same one, however many are proposed
                own = torch.cat([uniforms[:, :size], uniforms[:, -1:]], 1)
                accepted, following = ACCEPT_RATIO(logits, self.warp, tokens, proposal.q, proposal.columns, own, proposal.counts)
        return tokens, accepted, following, path


def rows_of(result: Tensor) -> list[list[int]]:
    """The new tokens of each row of a round's results."""
    return [tokens[:kept] for kept, tokens in zip(result[:, KEPT].tolist(), result[:, TOKENS:].tolist(), strict=True)]


def _decoded(results: Tensor, k: int) -> Decoded:
    """Of results [R, B, ...], the first being of prompts."""
    width = torch.arange(results.shape[2] - TOKENS)
    real = width < results[..., KEPT, None]
    tokens = [results[:, b, TOKENS:][real[:, b]].tolist() for b in range(results.shape[1])]
    rounds = results[1:]
    took_part = rounds[..., KEPT] > 0
    accepted, proposed = rounds[..., ACCEPTED] * took_part, rounds[..., PROPOSED] * took_part
    values: dict[str, Any] = {"accepted": int(accepted.sum()), "drafted": int(proposed.sum()), "drafts": int((proposed > 0).sum())}
    return Decoded(tokens, took_part.sum(0).tolist(), **values, by_position=[int((accepted > i).sum()) for i in range(k)])
