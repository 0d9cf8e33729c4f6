"""What surrounds CUDA graphs, with a device that is only played."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from angelslim_specdec.graphs import Feed, Graphs


@pytest.fixture
def captured(monkeypatch):
    """Pools that graphs are captured into, one after the other."""
    pools = []

    class Stream:
        def wait_stream(self, other):
            pass

    class CUDAGraph:
        def replay(self):
            pass

    @contextmanager
    def graph(made, pool=None):
        pools.append(pool)
        yield

    @contextmanager
    def stream(_):
        yield

    for name, value in {"Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    handles = iter(range(100))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    return pools


def test_graphs_of_an_engine_share_memory_and_those_of_another_do_not(captured):
    for graphs in (Graphs(), Graphs()):
        calls = []
        for k in range(3):
            run = graphs(partial(calls.append, k))
            for _ in range(4):
                run()
            assert calls.count(k) == 3, "twice for real, once while it is captured"
    assert captured == [0, 0, 0, 1, 1, 1]


class Flight:
    """An event; it knows what is copied until somebody waits for it."""

    def __init__(self, host):
        self.host, self.under_way = host, None

    def record(self):
        assert self.under_way is None, "nobody waited for the copy before"
        self.under_way = self.host.clone()

    def synchronize(self):
        assert self.under_way is None or torch.equal(self.host, self.under_way), "overwritten while it was being copied"
        self.under_way = None


def test_numbers_are_not_overwritten_while_they_are_copied():
    into = torch.zeros(2, 3)
    feed = Feed(into, 2)
    feed._events = [Flight(host) for host in feed._hosts]
    for turn in range(5):
        numbers = torch.full((2, 3), float(turn))
        feed.send(numbers)
        numbers.fill_(-1)
        assert torch.equal(into, torch.full((2, 3), float(turn)))
        flights = [e.under_way is not None for e in feed._events]
        assert flights == [True, turn > 0]


@pytest.mark.gpu
def test_a_device_gets_all_numbers_in_their_order():
    into, seen = torch.zeros(64, 6, device="cuda"), []
    feed = Feed(into, 2)
    for turn in range(200):
        feed.send(torch.full((64, 6), float(turn)))
        seen.append(into.mean())
    assert torch.stack(seen).tolist() == [float(turn) for turn in range(200)]
