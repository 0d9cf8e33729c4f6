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
from angelslim_distill.parameters import choose_parameters, matrices_of
from angelslim_distill.teacher import ModelTeacher, teacher_from, teacher_of
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


class Seeing(toys.Int3Along):
    """Keeps the mean of what it is shown first."""

    def __init__(self, weight):
        super().__init__(weight)
        self.mean = torch.nn.Parameter(torch.zeros(()))

    def inputs(self, x):
        if self.training and not self.mean:
            with torch.no_grad():
                self.mean.copy_(x.mean())
        return x


SOURCES = {"rows": Supervised, "uneven": Uneven, "silent": Silent}


def numbers_in(model):
    """How many numbers of a model are in this process's memory: of parameters that lie in parts only its share is."""
    return sum(getattr(p, "_local_tensor", p).untyped_storage().nbytes() // p.element_size() for p in model.parameters())


def trained(group, model, data, out, kind="Int3Along", source="rows", train="auto", shard="", stop="0", teacher="", top_k="0", held_out="0.2", muon=""):
    """Parameters, measures and losses of a training; `held`: the teacher's numbers that are in memory while its layers run, and at the end."""
    student = load_model(model, "cpu").model
    toys.rounded(student, Seeing if kind == "Seeing" else getattr(toys, kind))
    choose_parameters(student, train)
    rows = prepare(Path(data), load_tokenizer(Path(model)), "model", length=64, packed=False, held_out=float(held_out))
    options = TrainingOptions(steps=4, lr=1e-3, rates={".quantizer.": 1e-2}, accumulate=2, clip=1.0)
    made = SOURCES[source](rows.train, 4, accumulate=2, group=group)
    taught = ModelTeacher(student) if teacher == "itself" else teacher_of(student)
    if teacher not in ("", "itself"):
        taught = teacher_from(Path(teacher), load_tokenizer(Path(model)), "cpu")
    held = []
    for layer in taught.model.model.layers:
        layer.register_forward_hook(lambda *_: held.append(numbers_in(taught.model)))
    run = DistillTraining(
        student,
        made,
        taught,
        Objective(lm_weight=0.3, top_k=int(top_k) or None),
        options,
        Looks(rows.held_out, 2, 2, "last"),
        matrices=matrices_of(student) if muon else (),
        group=group,
        in_parts=bool(shard),
        checkpointing=bool(shard),
    )
    asked = iter(range(1, 100))
    history = run.run(Path(out) / "states", stop_requested=lambda: next(asked) == int(stop))
    looks = torch.tensor([[look[name] for name in ("kl", "perplexity", "tokens")] for look in history.looks], dtype=torch.float64)
    found = {"looks": looks, "losses": torch.tensor([loss for _, loss in history.losses]), "held": torch.tensor([max(held), numbers_in(taught.model)])}
    return {**found, **{n: p.detach().clone() for n, p in student.named_parameters()}}


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
    assert all(torch.equal(first[name], second[name]) for name in first)
    alike(first, wanted)
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
    assert all(torch.equal(first[name], second[name]) for name in first)
    alike(first, wanted)


@pytest.mark.parametrize(
    ("teacher", "options"),
    [({"num_hidden_layers": 5}, {}), ({"num_hidden_layers": 5, "tie_word_embeddings": True}, {"top_k": 7}), (None, {"train": "all"})],
    ids=["folder", "tied head that is read on the way back", "the model as it was"],
)
def test_no_process_holds_a_whole_teacher_of_weights_in_parts(two, given, tiny, tmp_path, teacher, options):
    if teacher is not None:
        options = {**options, "teacher": tiny("llama", dtype="float32", **teacher)}
    wanted = trained(Group(), **given, out=tmp_path / "one", **options)
    (tmp_path / "two").mkdir()
    assert two(**given, out=tmp_path / "two", shard="yes", **options) == [0, 0]
    first, second = (load_file(tmp_path / f"two/{rank}.safetensors") for rank in range(2))
    alike(first, wanted)
    model = load_model(options.get("teacher", given["model"]), "cpu").model
    whole, layer = numbers_in(model), numbers_in(model.model.layers[0])
    outside = whole - layer * len(model.model.layers)
    assert wanted["held"].tolist() == [whole, whole]
    for found in (first, second):
        most, left = found["held"].tolist()
        assert left <= 0.51 * whole, "half of it, where a row is not of both"
        assert most <= outside + layer + 0.51 * layer * (len(model.model.layers) - 1), "a layer and the head, and halves of all other layers"


def test_a_model_whose_weights_lie_in_parts_is_not_its_own_teacher(two, given, tmp_path):
    assert two(**given, out=tmp_path, shard="yes", teacher="itself") == [3, 3]
    assert "its own teacher" in (tmp_path / "0.error").read_text()


def test_muon_does_not_step_matrices_that_lie_in_parts(two, given, tmp_path):
    assert two(**given, out=tmp_path, shard="yes", muon="yes") == [2, 2]
    assert "lies in parts" in (tmp_path / "0.error").read_text()


def test_processes_with_unequal_numbers_of_rows_measure_as_one(two, given, tiny, tmp_path):
    """Of the rows that are held out one process has a batch more than the other, which runs its part of both models all the same."""
    options = {"held_out": 0.125, "teacher": tiny("llama", dtype="float32", num_hidden_layers=3)}
    held_out = prepare(Path(given["data"]), load_tokenizer(given["model"]), "model", length=64, packed=False, held_out=0.125).held_out
    assert len(held_out) == 5  # 3 and 2, in batches of 2
    wanted = trained(Group(), **given, out=tmp_path / "one", **options)
    assert two(**given, out=tmp_path, shard="yes", **options) == [0, 0]
    found = load_file(tmp_path / "0.safetensors")["looks"]
    torch.testing.assert_close(found, wanted["looks"], rtol=1e-3, atol=1e-6)


def alike(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - {"held"}:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_quantizers_are_shown_what_one_process_would_show_them(two, given, tmp_path):
    wanted = trained(Group(), **given, out=tmp_path / "one", kind="Seeing")
    assert two(**given, out=tmp_path, kind="Seeing") == [0, 0]
    found = load_file(tmp_path / "0.safetensors")
    alike(found, wanted)
    means = [name for name in wanted if name.endswith("quantizer.mean")]
    assert len(means) == 14 and all(wanted[name] for name in means)


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
