"""Rounds of decoding as CUDA graphs: the device works through a round without the host in between."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

# makes of a function what is called again and again
Runner = Callable[[Callable[[], None]], Callable[[], None]]
_WARM_UP = 2


class Graphs:
    """Makes graphs that share memory: never two at a time run, and nothing stays in it between them."""

    def __call__(self, function: Callable[[], None]) -> Graph:
        return Graph(function, self)

    @cached_property
    def handle(self) -> Any:
        """The pool, there from the first capture on."""
        return torch.cuda.graph_pool_handle()


class Graph:
    """Calls a function for real at first, then captures it, and replays it from then on.

    The function takes and returns nothing: it reads and writes tensors that stay where they are. The first calls let kernels
    be compiled and libraries get their workspaces, which may not happen while capturing; being rounds like any other they
    leave nothing to be undone. Capturing itself runs nothing.

    Args:
        pool: whose memory it takes.
    """

    def __init__(self, function: Callable[[], None], pool: Graphs) -> None:
        self._function, self._pool, self._calls = function, pool, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is None and self._calls < _WARM_UP:
            self._calls += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._function()
            torch.cuda.current_stream().wait_stream(side)
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with _nothing_freed(), torch.cuda.graph(graph, pool=self._pool.handle):
                self._function()
            self._graph = graph
        self._graph.replay()


@contextmanager
def _nothing_freed() -> Iterator[None]:
    """Without garbage collection: another engine's graph, freed while one is captured, would end the capture."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Readout:
    """Copies of a round's results on the host, without waiting for them until they are read."""

    def __init__(self, like: torch.Tensor, depth: int) -> None:
        self._hosts = [torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda) for _ in range(depth)]
        self._events: list[torch.cuda.Event | None] = [torch.cuda.Event() if like.is_cuda else None for _ in range(depth)]
        self._sent = 0

    def send(self, results: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin a copy; calling what is returned waits for it and gives a tensor of the host's own."""
        slot = self._sent % len(self._hosts)
        self._sent += 1
        host, event = self._hosts[slot], self._events[slot]
        host.copy_(results, non_blocking=True)
        if event is not None:
            event.record()

        def wait() -> torch.Tensor:
            if event is not None:
                event.synchronize()
            return host.clone()

        return wait


class Feed:
    """Copies numbers of the host into a tensor of the device, without waiting for those copied before.

    Args:
        depth: copies that may be under way; one more waits for the first of them, whose memory it takes.
    """

    def __init__(self, into: torch.Tensor, depth: int) -> None:
        self._into = into
        self._hosts = [torch.empty(into.shape, dtype=into.dtype, pin_memory=into.is_cuda) for _ in range(depth)]
        self._events: list[torch.cuda.Event | None] = [torch.cuda.Event() if into.is_cuda else None for _ in range(depth)]
        self._sent = 0

    def send(self, numbers: torch.Tensor) -> None:
        """Begin a copy; `numbers` may be changed at once."""
        slot = self._sent % len(self._hosts)
        self._sent += 1
        host, event = self._hosts[slot], self._events[slot]
        if event is not None:
            event.synchronize()
        host.copy_(numbers)
        self._into.copy_(host, non_blocking=True)
        if event is not None:
            event.record()
