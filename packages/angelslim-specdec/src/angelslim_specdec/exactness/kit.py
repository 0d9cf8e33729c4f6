"""The exactness kit: whatever drafts, text is what the target alone would give; and checks that would pass anything are found out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from angelslim_core.context import Progress, silent

from ..drafters.base import Warp
from .checks import WARPS, Greedy, sampled
from .drafters import Table
from .mutants import GREEDY, SAMPLED, replaced
from .statistics import joint
from .subject import SAMPLED_PROMPT, Way, bigrams, small_target, ways

# of a check that ought to pass, how improbable what is seen may be; there are dozens, and seeds are fixed
LEAST_P = 1e-4
CAUGHT_P = 1e-6


def run(samples: int = 4096, progress: Progress = silent) -> dict[str, Any]:
    """Every registered drafter under every rule, and the mutants.

    Returns:
        `ok`, `checks` [{name, ok, detail}] and `mutants` [{name, caught, p}]; where tokens are compared one by one p is 0 if they differ.
    """
    target = small_target()
    greedy = Greedy(target)
    everyone = ways(target)
    jobs = _greedy_jobs(greedy, everyone) + _sampled_jobs(target, everyone, samples)
    mutants = _mutants(target, greedy, samples)
    checks, caught = [], []
    for number, (name, detail, job) in enumerate(jobs):
        progress(number, len(jobs) + len(mutants), name)
        p = job()
        least = 1.0 if detail == _EQUAL else LEAST_P
        checks.append({"name": name, "ok": p >= least, "detail": detail if detail == _EQUAL else f"{detail}: p = {p:.3g}"})
    for number, (name, context, job) in enumerate(mutants, len(jobs)):
        progress(number, len(jobs) + len(mutants), name)
        with context():
            p = job()
        caught.append({"name": name, "caught": p < CAUGHT_P, "p": p})
    return {"ok": all(c["ok"] for c in checks) and all(m["caught"] for m in caught), "checks": checks, "mutants": caught}


_EQUAL = "token by token"


def _greedy_jobs(greedy: Greedy, everyone: list[Way]) -> list[Any]:
    jobs: list[Any] = []
    for way in [*everyone, *greedy.oracles()]:
        jobs.append((f"greedy, {way.name}", _EQUAL, lambda way=way: min(greedy.same(way, k) for k in (1, 4))))
        jobs.append((f"greedy, {way.name}, one row", _EQUAL, lambda way=way: min(greedy.same(way, 3, [p]) for p in greedy.wanted)))
    for way in everyone:
        jobs.append((f"draft state, {way.name}", _EQUAL, lambda way=way: greedy.fresh(way)))
    for way in greedy.oracles():
        jobs.append((f"stop tokens, {way.name}", _EQUAL, lambda way=way: greedy.stops(way)))
    jobs.append(("all tokens of a draft that is right are accepted", _EQUAL, greedy.accepts_all))
    return jobs


def _sampled_jobs(target: Any, everyone: list[Way], samples: int) -> list[Any]:
    jobs: list[Any] = []
    for number, (label, warp) in enumerate(WARPS.items()):
        expected = joint(target.model, SAMPLED_PROMPT, 4, warp)
        for way in everyone:
            rules = ("auto",) if way.tree else ("ratio", "match") if way.pruned or not way.samples else ("ratio",)
            if number and not way.name.startswith("table"):
                continue  # top-p is the engine's business, not the drafter's
            for rule in rules:
                call = lambda way=way, rule=rule, warp=warp, expected=expected: sampled(target, way, rule, warp, expected, samples)  # noqa: E731
                jobs.append((f"sampled, {way.name}, {'tree' if way.tree else rule}, {label}", "chi-square", call))
        if not number:
            paced = next(way for way in everyone if way.name == "table")
            call = lambda way=paced, warp=warp, expected=expected: sampled(target, way, "ratio", warp, expected, samples, paced=True)  # noqa: E731
            jobs.append(("sampled, table, ratio, length set by what was accepted", "chi-square", call))
    return jobs


def _mutants(target: Any, greedy: Greedy, samples: int) -> list[Any]:
    chain, tree = (next(w for w in greedy.oracles() if w.tree is kind and "third" in w.name) for kind in (False, True))
    never = next(w for w in greedy.oracles() if "never" in w.name)
    table = bigrams(target)
    warp = WARPS["temperature 1.2"]
    expected = joint(target.model, SAMPLED_PROMPT, 4, warp)
    drawn, branching = Way("table", lambda: Table(table), samples=True), Way("tree", lambda: Table(table, tree=True), tree=True)
    found: list[Any] = []
    for name, what in GREEDY.items():
        if "stop" in name:
            job = lambda: greedy.stops(chain)  # noqa: E731
        else:
            way = tree if "tree" in name else never if "whatever" in name else chain
            job = lambda way=way: greedy.same(way, 4)  # noqa: E731
        found.append((name, lambda what=what: replaced(*what), job))
    for name, what in SAMPLED.items():
        way = branching if name.startswith("tree") else drawn
        found.append((name, lambda what=what: replaced(*what), lambda way=way: sampled(target, way, "ratio", warp, expected, samples)))
    untempered = Way("q stated without its temperature", lambda: Table(table, stated=1.0), samples=True)
    sharp = Warp(0.7)
    at_sharp = joint(target.model, SAMPLED_PROMPT, 4, sharp)
    found.append(("q not tempered", nullcontext, lambda: sampled(target, untempered, "ratio", sharp, at_sharp, samples)))
    return found + _stale(target, greedy)


def _stale(target: Any, greedy: Greedy) -> list[Any]:
    """A draft that keeps reading what is past, of the first draft model there is that reads the target's layers."""
    reading = next((way for way in ways(target) if way.make().layer_ids), None)
    if reading is None:
        return []
    return [(f"stale draft rows, {reading.name}", nullcontext, lambda: greedy.fresh(reading, stale=True))]
