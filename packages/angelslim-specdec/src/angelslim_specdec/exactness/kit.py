"""The exactness kit: whatever drafts, text is what the target alone would give; and checks that would pass anything are found out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from angelslim_core.context import Progress, silent

from ..drafters.base import Warp
from ..engine import Rule
from ..target import Target
from .checks import CUTS, LENGTHS, WARPS, Greedy, sampled
from .drafters import Table
from .mutants import GREEDY, SAMPLED, replaced
from .statistics import joint
from .subject import PROMPTS, SAMPLED_PROMPT, Way, bigrams, small_target, ways

# of a check that ought to pass, how improbable what is seen may be; there are dozens, and seeds are fixed
LEAST_P = 1e-4
CAUGHT_P = 1e-6
_EQUAL = "token by token"

# name, how it is checked, what checks it
Job = tuple[str, str, Callable[[], float]]


def run(samples: int = 4096, progress: Progress = silent) -> dict[str, Any]:
    """Every registered drafter under every rule, and the mutants.

    Returns:
        `ok`, `checks` [{name, ok, detail}] and `mutants` [{name, caught, p}]; where tokens are compared one by one p is 0 if they differ.
    """
    target = small_target()
    greedy = Greedy(target)
    everyone = ways(target)
    jobs = _greedy_jobs(greedy, everyone) + _sampled_jobs(target, everyone, samples)
    mutants = _mutants(target, greedy, everyone, samples)
    checks, caught = [], []
    for number, (name, detail, job) in enumerate(jobs, 1):
        p = job()
        least = 1.0 if detail == _EQUAL else LEAST_P
        checks.append({"name": name, "ok": p >= least, "detail": detail if detail == _EQUAL else f"{detail}: p = {p:.3g}"})
        progress(number, len(jobs) + len(mutants), name)
    for number, (name, context, job) in enumerate(mutants, len(jobs) + 1):
        with context:
            p = job()
        caught.append({"name": name, "caught": p < CAUGHT_P, "p": p})
        progress(number, len(jobs) + len(mutants), name)
    return {"ok": all(c["ok"] for c in checks) and all(m["caught"] for m in caught), "checks": checks, "mutants": caught}


def _greedy_jobs(greedy: Greedy, everyone: list[Way]) -> list[Job]:
    jobs: list[Job] = []
    for way in [*everyone, *greedy.oracles()]:
        jobs.append((f"greedy, {way.name}", _EQUAL, partial(greedy.alike, way, (1, 4), PROMPTS)))
        jobs.append((f"greedy, {way.name}, one row", _EQUAL, partial(greedy.alike, way, (3,))))
    jobs += [(f"draft state, {way.name}", _EQUAL, partial(greedy.fresh, way)) for way in everyone]
    jobs += [(f"stop tokens, {way.name}", _EQUAL, partial(greedy.stops, way)) for way in greedy.oracles()]
    return [*jobs, ("all tokens of a draft that is right are accepted", _EQUAL, greedy.accepts_all)]


def _sampled_jobs(target: Target, everyone: list[Way], samples: int) -> list[Job]:
    jobs: list[Job] = []
    for number, (label, warp) in enumerate(WARPS.items()):
        expected = joint(target.model, SAMPLED_PROMPT, 4, warp)
        for way in everyone:
            if number and not way.name.startswith("table"):
                continue  # top-p is the engine's business, not the drafter's
            # the match rule verifies what is most probable, the same with a vocabulary of one's own and without
            rules: tuple[Rule, ...] = ("auto",) if way.tree else ("ratio", "match") if way.pruned or not way.samples else ("ratio",)
            for rule in rules:
                name = f"sampled, {way.name}, {'tree' if way.tree else rule}, {label}"
                jobs.append((name, "chi-square", partial(sampled, target, way, rule, warp, expected, samples)))
            for what, costs in (("length set by what was accepted", LENGTHS), ("cut by confidence", CUTS)) if way.name == "table" and not number else ():
                name = f"sampled, table, ratio, {what}"
                jobs.append((name, "chi-square", partial(sampled, target, way, "ratio", warp, expected, samples, costs)))
    return jobs


def _mutants(target: Target, greedy: Greedy, everyone: list[Way], samples: int) -> list[tuple[str, AbstractContextManager[None], Callable[[], float]]]:
    by_name = {way.name: way for way in greedy.oracles()}
    chain, tree = by_name["chain that is wrong at every third token"], by_name["tree that is wrong at every third token"]
    subjects = {"first token accepted, whatever it is": by_name["chain that is never right"], "tree's accepted keys not moved": tree}
    table, warp, flat = bigrams(target), WARPS["temperature 1.2"], Warp(2.0)
    expected, at_flat = (joint(target.model, SAMPLED_PROMPT, 4, w) for w in (warp, flat))
    drawn, branching = Way("table", lambda: Table(table), samples=True), Way("tree", lambda: Table(table, tree=True), tree=True)
    found: list[tuple[str, AbstractContextManager[None], Callable[[], float]]] = []
    for name, what in GREEDY.items():
        job = partial(greedy.stops, chain) if what[1] == "SETTLE" else partial(greedy.alike, subjects.get(name, chain), (4,), PROMPTS)
        found.append((name, replaced(*what), job))
    for name, what in SAMPLED.items():
        way = branching if what[1] == "tree_sample" else drawn
        costs = CUTS if what[1] == "scores" else None
        found.append((name, replaced(*what), partial(sampled, target, way, "ratio", warp, expected, samples, costs)))
    untempered = Way("q stated without its temperature", lambda: Table(table, stated=1.0), samples=True)
    found.append(("q not tempered", nullcontext(), partial(sampled, target, untempered, "ratio", flat, at_flat, samples)))
    reading = next(way for way in everyone if way.make().layer_ids)
    return [*found, (f"stale draft rows, {reading.name}", nullcontext(), partial(greedy.fresh, reading, stale=True))]
