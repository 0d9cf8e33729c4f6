"""Milliseconds of calls, and the memory that they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_WARM_UP = 3


class Spread(NamedTuple):
    """Milliseconds: median, and what nine of ten calls do not exceed."""

    median: float
    p90: float


def timed(call: Callable[[], object], repeats: int, device: str) -> Spread:
    """Time a call after a warm-up; on a GPU each one waits for the last, as tokens must be chosen before they are read."""
    times = []
    for repeat in range(repeats + (_WARM_UP if device == "cuda" else 1)):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat >= (_WARM_UP if device == "cuda" else 1):
            times.append(1e3 * (time.perf_counter() - start))
    return Spread(statistics.median(times), sorted(times)[max(0, round(0.9 * len(times)) - 1)])


def peak_mib(call: Callable[[], object], device: str) -> float | None:
    """MiB that a call allocates at its peak, beside what is allocated before; None on a CPU, where torch does not count."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
