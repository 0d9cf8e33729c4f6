"""Parameters in parts over processes step as whole ones do, and their states go on with any number of processes.

The file is also a program: a server that imports the libraries once and forks the processes of each training, as torchrun would start them.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from angelslim_core.errors import ModelError
from angelslim_core.parallel import Group, joined
from angelslim_core.training import Terms, Training, TrainingOptions

OPTIONS = {"steps": 8, "lr": 0.05, "accumulate": 2, "weight_decay": 0.1, "clip": 0.05}


class Model(nn.Module):
    """Of 3 rows, which two processes share unevenly, and of one, of which one process has none."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gain = nn.Linear(5, 3), nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.to(dtype)

    def loss(self, x, y):
        error = ((self.first(x.to(self.gain.dtype)) * self.gain).float() - y).square().mean(-1)
        counted = x[:, 0] > 0  # of which processes have different numbers
        return Terms(torch.stack([error[counted].sum()]), counted.sum()[None].float(), torch.ones(1), torch.tensor([float(len(x))]))


def rows(step, part, group):
    """This process's of the 12 rows of a batch: two thirds of them are the first one's of two."""
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(10 * step + part))
    y = x @ torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    cut = {1: slice(0, 12), 2: (slice(0, 8), slice(8, 12))[group.rank] if group.size == 2 else None}[group.size]
    return x[cut], y[cut]


def train(group, folder, stop=None, shard=False, dtype="float32", options=None, accurate=False):
    """Losses, norms and, of the first process, the parameters at the end; a state is kept where it stops."""
    model = Model(getattr(torch, dtype))
    if accurate:
        model.unused.data = model.unused.data.float()
    sharded = None
    if shard:
        from angelslim_core.sharded import Sharded

        def in_turn(m):
            yield m.first
            assert m.unused.dtype == getattr(torch, dtype), "fp32 copies are of one unit at a time"

        divided = {} if shard is True else {"whole": ["gain"], "units": in_turn}
        sharded = Sharded(model, lambda m, x, y: ((t := m.loss(x, y)).sums, t), group, **divided)
        assert all(p.untyped_storage().nbytes() <= 4 for p in model.parameters() if p is not model.unused or not accurate)
    training = Training(sharded or dict(model.named_parameters()), TrainingOptions(**{**OPTIONS, **(options or {})}), group)
    training.resume(folder)
    seen = []
    while not training.is_done and training.step != stop:
        training.advance(lambda step, part: (sharded or model.loss)(*rows(step, part, group)))
        found = training.seen()
        seen.append([found.loss, found.norm, *found.extra])
    if stop:
        training.save(folder)
    held = sum(m.numel() for m in training._masters.values())
    if sharded:
        sharded.gather()
    return {"seen": torch.tensor(seen), "held": torch.tensor(held), **{n: p.detach().clone() for n, p in model.named_parameters()}}


def serve():
    """Answer requests, one JSON document a line, until stdin ends."""
    from pathlib import Path

    import torch._dynamo  # noqa: F401, what DTensor imports late

    import angelslim_core.sharded  # noqa: F401

    def child(request, rank):
        signal.alarm(200)  # who waits for ever is not well
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]))
        with joined("cpu") as group:
            found = train(group, Path(request["folder"]), **request["given"])
        save_file(found, f"{request['folder']}/{rank}.safetensors")
        os._exit(0)

    for line in sys.stdin:
        request = json.loads(line)
        pids = [os.fork() or child(request, rank) for rank in range(2)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


@pytest.fixture(scope="module")
def two():
    """two(folder, ...): `train` by two processes."""
    process = subprocess.Popen([sys.executable, __file__], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(folder, **given):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process.stdin.write(json.dumps({"folder": str(folder), "port": port, "given": given}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == [0, 0]
        return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]

    yield run
    process.stdin.close()
    process.wait(timeout=60)


def same(found, wanted, rtol=1e-5, atol=1e-6):
    assert found.keys() == wanted.keys()
    for name in found.keys() - {"held"}:
        torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def test_parts_step_as_whole_parameters_do(two, tmp_path):
    wanted = train(Group(), tmp_path)
    for shard in (True, False):
        found = two(tmp_path, shard=shard)
        same(found[0], wanted)
        same(found[1], wanted)
        assert sum(int(f["held"]) for f in found) == (1 if shard else 2) * int(wanted["held"])
    assert wanted["seen"][:, 1].min() > OPTIONS["clip"], "the norm over all parts is what is clipped"


def test_parameters_that_stay_whole_step_alike_beside_units_in_parts(two, tmp_path):
    wanted = train(Group(), tmp_path / "none", stop=6)
    found, other = two(tmp_path, shard="units", stop=6)
    same(found, wanted)
    same(other, wanted)
    assert int(found["held"]) + int(other["held"]) == int(wanted["held"]) + 1
    whole = train(Group(), tmp_path)
    same({**two(tmp_path, shard="units")[0], "seen": whole["seen"]}, whole)


def test_a_state_goes_on_in_parts_and_whole(two, tmp_path):
    wanted = train(Group(), tmp_path / "none")
    first = two(tmp_path, shard=True, stop=2)[0]["seen"]
    second = train(Group(), tmp_path, stop=4)["seen"]
    third = two(tmp_path, shard=False, stop=6)[0]["seen"]
    last = two(tmp_path, shard=True)[1]
    same({**last, "seen": torch.cat((first, second, third, last["seen"]))}, wanted)
    with pytest.raises(ModelError, match="other options"):
        train(Group(), tmp_path, options={"steps": 9})
    assert load_file(tmp_path / "step-00000006/state.safetensors")["first.weight.exp_avg"].shape == (3, 5)


def test_parts_are_fp32_where_the_computation_is_not(two, tmp_path):
    options = {"lr": 1e-4, "weight_decay": 0}
    before = Model(torch.bfloat16)
    found, _ = two(tmp_path, shard="in units", dtype="bfloat16", options=options, stop=8)
    wanted = train(Group(), tmp_path / "one", dtype="bfloat16", options=options)
    master = load_file(tmp_path / "step-00000008/state.safetensors")["first.weight.master"]
    assert found["first.weight"].dtype == torch.bfloat16 and torch.equal(found["first.weight"], master.to(torch.bfloat16))
    assert (master - before.first.weight.float()).abs().min() > 1e-5, "small updates are lost"
    same(found, wanted, rtol=0.02, atol=0.01)


def test_parameters_of_a_dtype_of_their_own_stay_whole(two, tmp_path):
    given = {"dtype": "bfloat16", "options": {"lr": 1e-3}, "accurate": True}
    wanted = train(Group(), tmp_path / "one", **given)
    found, other = two(tmp_path, shard=True, **given)
    assert found["unused"].dtype == torch.float32 and not torch.equal(found["unused"], torch.ones(2, 2)), "weight decay moves it"
    assert int(found["held"]) + int(other["held"]) == int(wanted["held"]) + 4
    assert torch.equal(found["unused"], wanted["unused"]) and torch.equal(other["unused"], wanted["unused"])
    same(found, wanted, rtol=0.02, atol=0.01)


def test_single_numbers_are_refused(monkeypatch):
    from angelslim_core.sharded import Sharded

    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ModelError, match="no rows to share"):
        Sharded(model, lambda m: m, Group())


if __name__ == "__main__":
    serve()
