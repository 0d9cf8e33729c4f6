"""Training a draft: what a step sees, how it is told, and what is kept on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from angelslim_core.calibration.packing import Order, chunks
from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import StoppedError, UsageError
from angelslim_core.parallel import Group
from angelslim_core.training import Seen, Terms, Training, TrainingOptions

from ..drafts.base import Draft, Heads, Loss
from .features import Source
from .parts import parts_of


@dataclass(frozen=True)
class Accuracy:
    """How often a draft's first choice is the target's.

    Args:
        rates: of each token ahead, given that those before it are right.
    """

    loss: float
    rates: list[float]

    @property
    def expected(self) -> float:
        """Tokens a round if every token ahead were right or wrong by itself, the target's own counted; an estimate, not a measurement."""
        kept, total = 1.0, 1.0
        for rate in self.rates:
            kept *= rate
            total += kept
        return total

    @classmethod
    def of(cls, loss: float, hits: Sequence[float], asked: Sequence[float]) -> Accuracy:
        return cls(loss, [h / a if a else 0.0 for h, a in zip(hits, asked, strict=True)])

    def short(self) -> str:
        rates = "/".join(f"{r:.2f}".removeprefix("0") for r in self.rates[:3])
        return f"loss {self.loss:.3f}, acc {rates}, tau~{self.expected:.2f}"

    def as_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "accuracy": self.rates, "expected_acceptance_length": self.expected}


@dataclass
class History:
    """What a training has shown.

    Args:
        entries: one for each time it was looked at: `step`, `training`, and where there is one `validation` and `measured`.
        tokens: trained on, all processes together, since this process began.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class DraftTraining:
    """A draft that is being trained.

    Args:
        draft: on the device, in the dtype to compute with.
        source: rows and features to train on; `validation`: others, held out.
        batch: rows a step, over all processes.
        every: steps between two looks: validation, `look`, and a state that a killed training goes on with.
        look: called at each look with the step; what it measures is kept. Only in the first process.
        in_parts: fp32 weights and moments lie in parts over the processes, and `draft` has values only at looks and at the end.
        export: called with the step each `export_every` steps, 0 being never, in the first process.

    Raises:
        UsageError: the processes cannot share a batch evenly.
    """

    def __init__(
        self, draft: Draft, heads: Heads, source: Source, options: TrainingOptions, *, batch: int, validation: Source | None = None, every: int = 500,
        look: Callable[[int], dict[str, Any]] = lambda step: {}, export: Callable[[int], None] = lambda step: None, export_every: int = 0,
        group: Group | None = None, in_parts: bool = False,
    ) -> None:  # fmt: skip
        self.draft, self.heads, self.source, self.validation = draft, heads, source, validation
        self.group, self.every, self._look = group or Group(), every, look
        self._export, self._export_every = export, export_every
        self.order = Order(len(source.rows), batch, options.seed)
        if self.order.batch % self.group.size:
            raise UsageError(
                735, "--batch", f"{self.order.batch} rows a step cannot be shared by {self.group.size} processes", "give a multiple of their number"
            )
        self._parts = parts_of(draft, self.group) if in_parts else None
        self.training = Training(self._parts or dict(draft.named_parameters()), options, self.group)
        self.history = History()
        self._since: Seen | None = None

    def run(self, states: Path, progress: Progress = silent, stop_requested: Callable[[], bool] = never) -> History:
        """Train to the end, from the last state in a folder on.

        Raises:
            StoppedError: it was asked to stop; its state is kept.
        """
        training, options = self.training, self.training.options
        devices = [self.source.device] if self.source.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            training.resume(states)
            self.draft.train()
            began, last = time.perf_counter(), time.perf_counter()
            steps_before, spent = training.step, 0.0
            told: Accuracy | None = None
            while not training.is_done:
                training.advance(self._terms)
                now = time.perf_counter()
                is_look = training.step % self.every == 0 or training.is_done
                is_export = self._export_every > 0 and training.step % self._export_every == 0
                if now - last > 1 or is_look or is_export or training.step == steps_before + 1:
                    told, last = self._tell(training.seen()) or told, now
                    rate = self.history.tokens / max(now - began - spent, 1e-9)
                    progress(training.step, options.steps, f"{rate:.0f} tok/s, {told.short() if told else ''}")
                stops = bool(self.group.reduce(torch.tensor(float(stop_requested())), "max"))
                before = time.perf_counter()
                if is_export:
                    self._write()
                if is_look and self._since is not None:
                    self._record(self._accuracy(self._since))
                    self._since = None
                if is_look or is_export:
                    spent += time.perf_counter() - before
                if stops or (is_look and not training.is_done):
                    self._tell(training.seen())
                    training.save(states)
                if stops and not training.is_done:
                    raise StoppedError(3, "train", f"stopped as asked after step {training.step}; its state is kept", "run the same command again to go on")
            self.history.seconds = time.perf_counter() - began - spent
            if self._parts is not None:
                self._parts.gather()
            self.draft.eval()
        return self.history

    def _terms(self, step: int, part: int) -> Terms:
        numbers = self.order.numbers(step * self.training.options.accumulate + part)
        batch = self.source.batch(numbers[self.group.rank :: self.group.size])
        loss = self.draft.train_loss(batch, self.heads) if self._parts is None else self._parts(batch, self.heads)
        self.history.tokens += sum(len(self.source.rows[i]) for i in numbers)
        return Terms(loss.sums, loss.counts, loss.weights, torch.cat((loss.hits.float(), loss.asked.float())))

    def _tell(self, seen: Seen | None) -> Accuracy | None:
        """What is new, for the progress line, which comes when it is time; a look is of all steps since the last one."""
        if seen is None:
            return None
        self._since = seen if self._since is None else self._since.joined(seen)
        return self._accuracy(seen)

    @staticmethod
    def _accuracy(seen: Seen) -> Accuracy:
        half = len(seen.extra) // 2
        return Accuracy.of(seen.loss, seen.extra[:half], seen.extra[half:])

    def _write(self) -> None:
        if self._parts is not None:
            self._parts.gather()
        if self.group.rank == 0:
            self._export(self.training.step)
        if self._parts is not None:
            self._parts.release()

    def _record(self, told: Accuracy) -> None:
        entry: dict[str, Any] = {"step": self.training.step, "training": told.as_dict()}
        if self._parts is not None:
            self._parts.gather()
        self.draft.eval()
        if self.validation is not None:
            entry["validation"] = evaluate(self.draft, self.heads, self.validation, max(1, self.order.batch // self.group.size), self.group).as_dict()
        if self.group.rank == 0:
            entry |= self._look(self.training.step)
        self.group.share(None)
        self.draft.train()
        if self._parts is not None:
            self._parts.release()
        self.history.entries.append(entry)


@torch.no_grad()
def evaluate(draft: Draft, heads: Heads, source: Source, batch: int, group: Group | None = None) -> Accuracy:
    """Loss and accuracy over all rows, each counted once, however many processes share them."""
    group = group or Group()
    totals: Loss | None = None
    torch.manual_seed(0)  # what a loss draws is the same each time
    mine, first = (list(chunks(range(rank, len(source.rows), group.size), batch)) for rank in (group.rank, 0))
    for numbers in mine + [[]] * (len(first) - len(mine)):
        if not numbers:  # others have a batch more
            source.features([])
            continue
        found = draft.train_loss(source.batch(numbers), heads)
        totals = (
            found
            if totals is None
            else Loss(totals.sums + found.sums, totals.counts + found.counts, found.weights, totals.hits + found.hits, totals.asked + found.asked)
        )
    device = source.device
    widths = group.reduce(torch.tensor([0, 0] if totals is None else [len(totals.sums), len(totals.hits)]), "max")
    if totals is None:  # more processes than rows
        terms, tokens = (torch.zeros(int(width), device=device) for width in widths)
        totals = Loss(terms, terms, terms, tokens, tokens)
    weights = group.reduce(totals.weights.float().clone(), "max")
    numbers_of = torch.stack([t.float() for t in (totals.sums, totals.counts)])
    sums, counts = group.reduce(numbers_of)
    sizes = torch.cat((totals.hits.float(), totals.asked.float()))
    hits, asked = group.reduce(sizes).chunk(2)
    return Accuracy.of(float((weights * sums / counts.clamp(min=1)).sum()), hits.tolist(), asked.tolist())
