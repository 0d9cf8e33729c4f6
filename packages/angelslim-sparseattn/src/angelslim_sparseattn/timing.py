"""Milliseconds of calls, on a GPU by events and elsewhere by the clock; dense attention of torch to compare with."""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WARM_UP = 3


class Spread(NamedTuple):
    """Milliseconds: median, and what nine of ten calls do not exceed."""

    median: float
    p90: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """Of single calls."""
        return cls(statistics.median(times), sorted(times)[max(0, round(0.9 * len(times)) - 1)])


def timed(call: Callable[[], object], repeats: int, device: str) -> Spread:
    """Time a call after a warm-up; calls follow each other without waiting for the GPU."""
    return Spread.of(_times(call, repeats, _WARM_UP if device == "cuda" else 1, device))


def timed_by_turns(calls: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, Spread]:
    """Time several calls in rounds of a few of each, so that none has a warmer or cooler device than the others; they must have run before.

    Each round has another order: what runs before a call sets the clock it begins with, which on a GPU at its power limit is worth a tenth.
    """
    few = max(2, repeats // 6)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(1, repeats // few)):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            times[name] += _times(calls[name], few, 1, device)
    return {name: Spread.of(found) for name, found in times.items()}


def _times(call: Callable[[], object], repeats: int, warm_up: int, device: str) -> list[float]:
    if device == "cuda":
        torch.cuda.synchronize()
    for _ in range(warm_up):  # while the GPU is at them the host gets ahead, so that launching counts where it is the slower only
        call()
    if device != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for first, last in zip(marks[::2], marks[1::2], strict=True):
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in zip(marks[::2], marks[1::2], strict=True)]


@contextmanager
def fastest_sdpa(device: str) -> Iterator[None]:
    """Inside, torch's attention takes cuDNN before FlashAttention before the rest, on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device != "cuda":
        yield
        return
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def _sdpa(backend: str) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    return call


def _fa4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out: Any = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # type: ignore[no-any-return]


def has_fa4() -> bool:
    """Whether `flash_attn.cute` is installed."""
    return importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None


def dense_peers(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor] | None]:
    """Dense causal attention to compare with, by name; None: not installed."""
    if device != "cuda":
        return {"sdpa": lambda q, k, v, scale: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)}
    return {"cudnn": _sdpa("CUDNN_ATTENTION"), "flash": _sdpa("FLASH_ATTENTION"), "fa4": _fa4 if has_fa4() else None}
