"""What a draft brings: tokens per second with it and without it in the same engine, and how many of its tokens are accepted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import torch

from angelslim_core.context import Progress, silent

from .adaptive import Pace
from .drafters.autoregressive import Tree
from .drafters.base import Drafter, Warp
from .engine import Engine, Rule
from .generation import drafter_of

if TYPE_CHECKING:
    from .target import Target

PLAIN = "plain"
NOTE = (
    "Acceptance length counts the token that follows the accepted ones: 1 + accepted / rounds. Times hold prompts, too; what is called decoding is what follows "
    "the first token."
)


@dataclass(frozen=True)
class Contender:
    """A way to decode: a drafter's name, PLAIN being none, how many tokens it proposes, and whether that is the most, rounds being as `adaptive.Pace` says.

    Args:
        tree: (top_k, total) of a tree of k levels; None: a chain.
    """

    name: str
    k: int = 0
    adaptive: bool = False
    tree: tuple[int, int] | None = None

    def __str__(self) -> str:
        tree = "" if self.tree is None else f", tree {self.tree[0]} x {self.tree[1]}"
        return f"{self.name}{tree}{', adaptive' if self.adaptive else ''}"


@dataclass
class Counts:
    """What rounds of decoding counted, summed over rows; adds up over batches of one prompt set only.

    Args:
        tokens: emitted.
        rounds: of rows, verifications by the target; one without a proposal, which a lookup may not have, is one too.
        accepted_at: rounds in which the proposed token of each position was accepted.
        prompt_seconds: until the first token of every row.
    """

    tokens: int = 0
    rounds: int = 0
    accepted_at: list[int] = field(default_factory=list)
    prompt_seconds: float = 0.0

    def add(self, other: Counts) -> None:
        """Another batch's."""
        size = max(len(self.accepted_at), len(other.accepted_at))
        padded = [[*c.accepted_at, *[0] * (size - len(c.accepted_at))] for c in (self, other)]
        self.tokens, self.rounds, self.accepted_at = self.tokens + other.tokens, self.rounds + other.rounds, [a + b for a, b in zip(*padded, strict=True)]
        self.prompt_seconds += other.prompt_seconds

    @property
    def acceptance_length(self) -> float:
        """Tokens a round, the one that follows the accepted ones counted."""
        return 1 + sum(self.accepted_at) / self.rounds if self.rounds else 1.0

    @property
    def rates(self) -> list[float]:
        """Share of rounds in which each position was accepted."""
        return [n / self.rounds for n in self.accepted_at] if self.rounds else []


class Decode(Protocol):
    """Decodes one batch; returns each row's new tokens, stop token included, and the counts."""

    def __call__(self, prompts: Sequence[Sequence[int]], contender: Contender, temperature: float, seed: int) -> tuple[list[list[int]], Counts]: ...


def machine(device: str) -> dict[str, Any]:
    """Where it was measured: device, threads, versions of libraries and of this package."""
    from angelslim_core.artifact import versions
    from angelslim_core.device import device_name

    from . import __version__

    return {"device": device_name(device), "threads": torch.get_num_threads(), "versions": {"angelslim-specdec": __version__, **versions()}}


def name_of(draft: str) -> str:
    """What results of a drafter or of a draft's folder go by: its own name, unless that is another drafter's, or PLAIN."""
    from .registry import drafters

    name = Path(draft).name
    return f"{name} (folder)" if draft not in drafters() and name in {PLAIN, *drafters()} else name


def maker(draft: str, target: Target) -> Callable[[], Drafter]:
    """Makes drafters of a registered name, or of a folder that is read once; each holds the state of one batch.

    Raises:
        ModelError: as `folder.load_draft`.
    """
    from .registry import drafters

    if draft in (known := drafters()):
        return known[draft]
    from .folder import load_draft

    loaded = load_draft(Path(draft), target.shape).to(target.device, target.dtype).eval()
    return lambda: loaded.drafter(target.heads())


def questions(file: Path, most: int) -> list[list[dict[str, Any]]]:
    """What users say first in each of a file's rows, system turns before it included.

    Raises:
        RecipeError: as `read_prompts`.
    """
    from angelslim_core.calibration.chats import read_prompts

    chats = [c.messages for c in read_prompts(file)[:most]]
    return [chat[: 1 + next(i for i, m in enumerate(chat) if m["role"] == "user")] for chat in chats]


class Decoder:
    """Decodes by engines that are kept, with their graphs, while batch size and temperature stay the same.

    Args:
        makers: by contenders' names.
        capacity: tokens a row may have.
    """

    def __init__(self, target: Target, makers: Mapping[str, Callable[[], Drafter]], capacity: int, max_new_tokens: int, rule: Rule = "auto") -> None:
        self._target, self._makers, self._capacity, self._max_new_tokens, self._rule = target, makers, capacity, max_new_tokens, rule
        self._engines: dict[Contender, Engine] = {}
        self._of: tuple[int, float] | None = None

    def __call__(self, prompts: Sequence[Sequence[int]], contender: Contender, temperature: float, seed: int) -> tuple[list[list[int]], Counts]:
        """As `Decode`."""
        if self._of != (len(prompts), temperature):
            self._engines.clear()
            self._of = (len(prompts), temperature)
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(list(prompt))
        lengths = torch.tensor([len(p) for p in prompts])
        if contender not in self._engines:
            self._engines[contender] = self._engine(contender, len(prompts), temperature)
        seeds = range(seed * len(prompts), (seed + 1) * len(prompts))
        found = self._engines[contender].decode(ids, lengths, self._max_new_tokens, seeds)
        return found.tokens, Counts(sum(map(len, found.tokens)), sum(found.rounds), found.by_position, found.prompt_seconds)

    def _engine(self, contender: Contender, rows: int, temperature: float) -> Engine:
        tree = None if contender.tree is None else Tree(contender.k, *contender.tree)
        drafter = None if contender.name == PLAIN else drafter_of(self._makers[contender.name](), self._target, tree)
        k = contender.k or 1
        pace = Pace(k, rows, cuts=tree is None) if contender.adaptive else None
        return Engine(
            self._target, drafter, rows, self._capacity, k=k, warp=Warp(temperature), rule=self._rule, stops=self._target.stop_ids, pace=pace
        )  # fmt: skip


def batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[Sequence[int]]]:
    """Prompts in their order; the last batch is filled up from the first ones, so that all are of one size."""
    whole = [prompts[i % len(prompts)] for i in range(-(-len(prompts) // size) * size)]
    return [list(whole[at : at + size]) for at in range(0, len(whole), size)]


def bench(
    sets: Mapping[str, Sequence[Sequence[int]]], contenders: Sequence[Contender], decode: Decode,
    *, sizes: Sequence[int] = (1,), temperatures: Sequence[float] = (0.0,), repeats: int = 3, device: str = "cpu", progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Rows of every set, batch size, temperature and contender, and their means over sets.

    Within a cell contenders take turns, each repeat the other way round; a speed is the median over repeats.

    Args:
        sets: name -> prompts as token ids.
        contenders: without PLAIN, which always runs.
    """
    rows: list[dict[str, Any]] = []
    cells = [(batch, temperature, name) for batch in sizes for temperature in temperatures for name in sets]
    everyone = [Contender(PLAIN), *contenders]
    total, done = len(cells) * repeats * len(everyone), 0
    for batch, temperature, name in cells:
        parts = batches(sets[name], batch)
        runs: dict[Contender, list[_Run]] = {c: [] for c in everyone}
        for contender in everyone:  # warm-up: graphs are captured, memory is reserved
            decode(parts[0], contender, temperature, 0)
        for turn in range(repeats):
            for contender in everyone if turn % 2 == 0 else everyone[::-1]:
                runs[contender].append(_run(parts, contender, temperature, decode, device))
                done += 1
                progress(done, total, f"{name}, batch {batch}, temperature {temperature:g}, {contender} {contender.k or ''}")
        rows += _rows(runs, {"set": name, "batch": batch, "temperature": temperature, "prompts": len(sets[name])})
    return {"rows": rows, "means": means(rows)}


@dataclass
class _Run:
    texts: list[list[int]]
    counts: Counts
    seconds: float
    peak_bytes: int | None

    @property
    def speed(self) -> float:
        return self.counts.tokens / self.seconds

    @property
    def decoding(self) -> float:
        """Tokens per second after the first ones."""
        return self.counts.tokens / (self.seconds - self.counts.prompt_seconds)


def _run(parts: Iterable[Sequence[Sequence[int]]], contender: Contender, temperature: float, decode: Decode, device: str) -> _Run:
    texts: list[list[int]] = []
    counts = Counts()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for seed, part in enumerate(parts):
        said, found = decode(part, contender, temperature, seed)
        texts += said
        counts.add(found)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return _Run(texts, counts, seconds, torch.cuda.max_memory_allocated() if device == "cuda" else None)


def _rows(runs: Mapping[Contender, Sequence[_Run]], where: Mapping[str, Any]) -> list[dict[str, Any]]:
    plain = next(found for contender, found in runs.items() if contender.name == PLAIN)
    plain_speed, plain_decoding = (median(values) for values in zip(*((r.speed, r.decoding) for r in plain), strict=True))
    rows = []
    for contender, found in runs.items():
        counts, texts = found[0].counts, found[0].texts
        speed, decoding = (median(values) for values in zip(*((r.speed, r.decoding) for r in found), strict=True))
        row: dict[str, Any] = {
            **where, "drafter": str(contender), "k": contender.k, "tokens": counts.tokens, "tokens_per_s": speed, "decoding_tokens_per_s": decoding,
            "spread": [min(r.speed for r in found), max(r.speed for r in found)], "peak_bytes": found[0].peak_bytes,
        }  # fmt: skip
        if contender.name != PLAIN:
            row |= {
                "speedup": speed / plain_speed,
                "decoding_speedup": decoding / plain_decoding,
                "acceptance_length": counts.acceptance_length,
                "rates": counts.rates,
                "rounds": counts.rounds,
            }
            if not where["temperature"]:
                row["same_text"] = sum(a == b for a, b in zip(texts, plain[0].texts, strict=True)) / len(texts)
        rows.append(row)
    return rows


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Over prompt sets, each counting alike."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["batch"], row["temperature"], row["drafter"], row["k"]), []).append(row)
    found = []
    for (batch, temperature, drafter, k), members in groups.items():
        mean: dict[str, Any] = {"set": "mean", "batch": batch, "temperature": temperature, "drafter": drafter, "k": k, "sets": len(members)}
        for key in ("tokens_per_s", "decoding_tokens_per_s", "speedup", "decoding_speedup", "acceptance_length", "same_text"):
            if all(key in m for m in members):
                mean[key] = sum(m[key] for m in members) / len(members)
        if all("rates" in m for m in members):
            width = max(len(m["rates"]) for m in members)
            mean["rates"] = [sum(m["rates"][at] if at < len(m["rates"]) else 0.0 for m in members) / len(members) for at in range(width)]
        found.append(mean)
    return found


def transformers_speed(
    model: Any, sets: Mapping[str, Sequence[Sequence[int]]], temperatures: Sequence[float], max_new_tokens: int, most: int = 8, progress: Progress = silent
) -> list[dict[str, Any]]:  # fmt: skip
    """Tokens per second of transformers' own `generate`, batch 1, over the first prompts of each set."""
    rows = []
    for number, (name, prompts) in enumerate(sets.items()):
        inputs = [torch.tensor([list(p)], device=model.device) for p in prompts[:most]]
        for temperature in temperatures:
            how: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or None, "top_p": None, "top_k": None}
            model.generate(inputs[0], attention_mask=torch.ones_like(inputs[0]), max_new_tokens=4, **how)
            start = time.perf_counter()
            tokens = 0
            for ids in inputs:
                tokens += model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **how).shape[1] - ids.shape[1]
            rows.append({"set": name, "temperature": temperature, "prompts": len(inputs), "tokens_per_s": tokens / (time.perf_counter() - start)})
        progress(number + 1, len(sets), f"transformers' generate, {name}")
    return rows
