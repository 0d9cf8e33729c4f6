"""Two processes that each hold a part of the vocabulary find what one that holds all of it finds.

The file is also the program that they run.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from angelslim_distill.kinds import KINDS, Loss
from angelslim_distill.losses import kd_sums
from angelslim_distill.vocab_parallel import sharded_kd_sums

V, CUT = 11, 7
CASES = [(kind, temperature, dtype) for kind in KINDS for temperature in (1.0, 2.0) for dtype in ("float64", "bfloat16")]


def made(dtype):
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 4, V, generator=generator, dtype=torch.float64).mul(3).to(getattr(torch, dtype)) for _ in range(2))
    s[0, 0, 9], t[0, 1, 2] = 1e4, -1e4
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    return s.requires_grad_(), t, mask, torch.randint(V, (3, 4), generator=generator)


def shards(rank):
    """Of each case: total, mean and gradient of this process's shard; then those of no valid token, and an error."""
    own = slice(0, CUT) if rank == 0 else slice(CUT, V)
    found = []
    for kind, temperature, dtype in CASES:
        s, t, mask, labels = made(dtype)
        for counted in (mask, torch.zeros_like(mask)):
            shard = s.detach()[..., own].requires_grad_()
            sums = sharded_kd_sums(shard, t[..., own], counted, Loss(kind, temperature, 0.3), labels)
            (gradient,) = torch.autograd.grad(sums.mean, shard)
            found.append({"total": sums.total.item(), "count": sums.count.item(), "gradient": gradient.double().tolist()})
    return found


def run(rank, port, out):
    signal.alarm(100)  # who waits for ever is not well
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump(shards(rank), file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the processes found, by rank."""
    out = tmp_path_factory.mktemp("shards")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(out)], env=environment) for rank in range(2)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_shards_are_the_whole(two, case):
    kind, temperature, dtype = CASES[case]
    s, t, mask, labels = made(dtype)
    for number, counted in enumerate((mask, torch.zeros_like(mask))):
        wanted = kd_sums(s, t, counted, Loss(kind, temperature, 0.3), labels)
        (gradient,) = torch.autograd.grad(wanted.mean, s)
        parts = [rank[2 * case + number] for rank in two]
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-5, "atol": 1e-6}
        for part in parts:
            torch.testing.assert_close(torch.tensor(part["total"], dtype=torch.float64), wanted.total.detach().double(), **tolerance)
            assert part["count"] == wanted.count
        found = torch.cat([torch.tensor(part["gradient"], dtype=torch.float64) for part in parts], -1)
        torch.testing.assert_close(found, gradient.double(), **(tolerance if dtype == "float64" else {"rtol": 0.01, "atol": 1e-6}))


def test_labels_are_asked_for():
    """Before anything is exchanged."""
    s, t, mask, _ = made("float64")
    with pytest.raises(ValueError, match="labels"):
        sharded_kd_sums(s, t, mask, Loss("cakld"))
    with pytest.raises(ValueError, match="vocabulary"):
        sharded_kd_sums(s, t[..., 1:], mask, Loss())


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2], sys.argv[3])
