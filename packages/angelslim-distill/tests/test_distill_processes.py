"""Two processes train a student as one does.

The file is also a program: a server that imports the libraries once and forks the processes of each training, as torchrun would start them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core.errors import AngelslimError
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.parallel import Group, joined
from angelslim_core.testing import training as toys
from angelslim_core.training import TrainingOptions
from angelslim_distill.data.rows import Supervised, prepare
from angelslim_distill.objective import Objective
from angelslim_distill.parameters import choose_parameters
from angelslim_distill.teacher import teacher_of
from angelslim_distill.trainer import DistillTraining, Looks


class Uneven(Supervised):
    """Only rows of the first process count, in each step from the second on."""

    def batch(self, step, part):
        batch = super().batch(step, part)
        if step and self.group.rank:
            batch.counted.zero_()
        return batch


class Silent(Supervised):
    """Nothing counts in any process."""

    def batch(self, step, part):
        batch = super().batch(step, part)
        batch.counted.zero_()
        return batch


SOURCES = {"rows": Supervised, "uneven": Uneven, "silent": Silent}


def trained(group, model, data, out, kind="Int3Along", source="rows", train="auto", shard="", stop="0"):
    """Parameters, measures and losses of a training."""
    student = load_model(model, "cpu").model
    toys.rounded(student, getattr(toys, kind))
    choose_parameters(student, train)
    rows = prepare(Path(data), load_tokenizer(Path(model)), "model", length=64, packed=False, held_out=0.2)
    options = TrainingOptions(steps=4, lr=1e-3, rates={".quantizer.": 1e-2}, accumulate=2, clip=1.0)
    made = SOURCES[source](rows.train, 4, accumulate=2, group=group)
    run = DistillTraining(
        student,
        made,
        teacher_of(student),
        Objective(lm_weight=0.3),
        options,
        Looks(rows.held_out, 2, 2, "last"),
        group=group,
        in_parts=bool(shard),
        checkpointing=bool(shard),
    )
    asked = iter(range(1, 100))
    history = run.run(Path(out) / "states", stop_requested=lambda: next(asked) == int(stop))
    looks = torch.tensor([[look[name] for name in ("kl", "perplexity", "tokens")] for look in history.looks], dtype=torch.float64)
    return {"looks": looks, "losses": torch.tensor([loss for _, loss in history.losses]), **{n: p.detach().clone() for n, p in student.named_parameters()}}


def serve():
    """Answer requests, one JSON document a line, until stdin ends."""

    import torch._dynamo  # noqa: F401, what DTensor imports late

    import angelslim_core.sharded  # noqa: F401

    def child(request, rank):
        signal.alarm(200)  # who waits for ever is not well
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]))
        try:
            with joined("cpu") as group:
                found = trained(group, **request["given"])
            save_file(found, f"{request['given']['out']}/{rank}.safetensors")
        except AngelslimError as error:
            Path(f"{request['given']['out']}/{rank}.error").write_text(str(error))
            os._exit(error.exit_code)
        os._exit(0)

    for line in sys.stdin:
        request = json.loads(line)
        pids = [os.fork() or child(request, rank) for rank in range(2)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


@pytest.fixture(scope="module")
def two():
    """two(out=..., ...): exit codes of `train` in two processes."""
    process = subprocess.Popen([sys.executable, __file__], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(**given):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process.stdin.write(json.dumps({"port": port, "given": {k: str(v) for k, v in given.items()}}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def given(tiny, tmp_path_factory):
    return {"model": tiny("llama", dtype="float32"), "data": toys.chats(tmp_path_factory.mktemp("data") / "chats.jsonl")}


@pytest.mark.parametrize("kind", ["Int3", "Int3Along"])
def test_two_processes_train_as_one(two, given, tmp_path, kind):
    wanted = trained(Group(), **given, out=tmp_path / "one", kind=kind)
    (tmp_path / "two").mkdir()
    assert two(**given, out=tmp_path / "two", kind=kind) == [0, 0]
    first, second = (load_file(tmp_path / f"two/{rank}.safetensors") for rank in range(2))
    assert first.keys() == wanted.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in wanted:
        torch.testing.assert_close(first[name], wanted[name], rtol=1e-3, atol=1e-6, msg=name)
    moved = load_model(given["model"], "cpu").model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(wanted["model.layers.0.mlp.up_proj.weight"], moved) == (kind == "Int3")


@pytest.mark.parametrize("train", ["auto", "all"])
def test_weights_in_parts_train_as_whole_ones_and_their_states_go_on_whole(two, given, tmp_path, train):
    wanted = trained(Group(), **given, out=tmp_path / "one", train=train)
    (tmp_path / "two").mkdir()
    assert two(**given, out=tmp_path / "two", train=train, shard="yes", stop=2) == [75, 75]
    assert two(**given, out=tmp_path / "two", train=train, stop=1) == [75, 75]
    assert two(**given, out=tmp_path / "two", train=train, shard="yes") == [0, 0]
    first, second = (load_file(tmp_path / f"two/{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(first[name], wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_scales_alone_have_no_parts(two, given, tmp_path):
    assert two(**given, out=tmp_path, kind="Int3", shard="yes") == [3, 3]
    assert "only quantizers are trained" in (tmp_path / "0.error").read_text()


def test_a_process_without_any_token_that_counts_takes_part(two, given, tmp_path):
    assert two(**given, out=tmp_path, source="uneven") == [0, 0]
    assert torch.equal(*(load_file(tmp_path / f"{rank}.safetensors")["looks"] for rank in range(2)))


def test_a_step_in_which_nothing_counts_in_any_process_ends_all(two, given, tmp_path):
    assert two(**given, out=tmp_path, source="silent") == [3, 3]
    assert all("no token that counts" in (tmp_path / f"{rank}.error").read_text() for rank in range(2))


if __name__ == "__main__":
    serve()
