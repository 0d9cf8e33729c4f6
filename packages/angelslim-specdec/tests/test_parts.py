"""Drafts trained in parts by several processes are those that one process makes.

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
from safetensors.torch import load_file

from angelslim_core.cli import main as cli


def serve():
    """Answer requests, one JSON document a line, until stdin ends."""
    import torch._dynamo  # what DTensor imports late

    import angelslim_core.sharded  # noqa: F401
    import angelslim_specdec.training.whole  # noqa: F401
    from angelslim_core.errors import NumericError
    from angelslim_core.loading import load_model
    from angelslim_core.training import Training
    from angelslim_specdec.drafters import autoregressive, block  # noqa: F401
    from angelslim_specdec.target import Target
    from angelslim_specdec.training.features import Source

    Target(load_model(sys.argv[1], "cpu").model).features(torch.zeros(1, 2, dtype=torch.int64), (0,))

    def child(request, rank):
        size, strike = str(request["processes"]), request["strike"]
        if size != "1":
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(request["port"])
        with open(f"{request['log']}.{rank}", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        signal.alarm(200)  # who waits for ever is not well
        advance, batch = Training.advance, Source.batch

        def dying(training, terms):
            if training.step == 3:
                os.kill(os.getpid(), 9)
            advance(training, terms)

        def failing(source, numbers):
            raise NumericError(999, "here", "a number is not finite")

        if rank == 1 and strike:
            Training.advance, Source.batch = (dying, batch) if strike == "kill" else (advance, failing)
        code = cli._guarded(request["arguments"])
        sys.stdout.flush()
        os._exit(code)

    for line in sys.stdin:
        request = json.loads(line)
        pids = [os.fork() or child(request, rank) for rank in range(request["processes"])]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


class Server:
    """Runs of `angelslim specdec train` on one model and its conversations."""

    def __init__(self, model, folder):
        self.folder, chats = folder, folder / "chats.jsonl"
        words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
        drawn = [words[i] for i in torch.randint(len(words), (200,), generator=torch.Generator().manual_seed(0)).tolist()]
        turns = [{"id": str(i), "conversations": [{"role": "user", "content": " ".join(drawn[16 * i :][:2])},
                                                  {"role": "assistant", "content": " ".join(drawn[16 * i + 4 :][:8])}]} for i in range(12)]  # fmt: skip
        chats.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
        self.common = [
            "specdec",
            "train",
            "--model",
            model,
            "--data",
            chats,
            "--device",
            "cpu",
            "--json",
            "--length",
            "96",
            "--batch",
            "2",
            "--steps",
            "6",
            "--lr",
            "0.01",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ANGELSLIM_QUIET": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, model], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, out, *arguments, processes=2, strike=None):
        """Exit codes by process."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        given = [*map(str, [*self.common, "--out", self.folder / out, *arguments])]
        request = {"arguments": given, "processes": processes, "port": port, "log": str(self.folder / "log"), "strike": strike}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def log(self, rank=0):
        return Path(f"{self.folder / 'log'}.{rank}").read_text()

    def made(self, out):
        """Tensors, and the history of losses."""
        return load_file(self.folder / out / "model.safetensors"), json.loads((self.folder / out / "training.json").read_text())["history"]

    def same(self, one, two):
        (a, seen), (b, wanted) = self.made(one), self.made(two)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        for x, y in zip(seen, wanted[-len(seen) :], strict=True):
            assert x.keys() == y.keys() and x["step"] == y["step"] and x["validation"]["loss"] > 0
            for part in x.keys() - {"step", "measured"}:
                assert x[part]["loss"] == pytest.approx(y[part]["loss"], rel=1e-4) and x[part]["accuracy"] == pytest.approx(y[part]["accuracy"])
            assert x.get("measured") == y.get("measured")


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    server = Server(tiny(dtype="float32"), tmp_path_factory.mktemp("parts"))
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=60)


EAGLE = ("--draft", "eagle3", "--validation", "0.4", "--every", "1")


@pytest.fixture(scope="module")
def alone(server):
    """An EAGLE-3 draft that one process trained."""
    assert server.run("alone", *EAGLE, processes=1) == [0], server.log()
    return "alone"


@pytest.mark.parametrize("shard", ["none", "draft", "all"])
def test_two_processes_train_as_one(server, alone, shard):
    """Of five held-out rows one process has more batches than the other, and rows that one kept the other may lack."""
    assert server.run(shard, *EAGLE, "--shard", shard) == [0, 0], server.log()
    server.same(shard, alone)
    assert server.log(1) == "" and not list(server.folder.glob(".*"))


def test_exports_and_probes_see_the_whole_draft(server):
    given = (
        "--draft",
        "dflash",
        "--validation",
        "0.4",
        "--set",
        "num_hidden_layers=2",
        "--set",
        "block_size=4",
        "--probe",
        "2",
        "--every",
        "3",
        "--export-every",
        "3",
    )
    assert server.run("plain", *given) == [0, 0], server.log()
    assert server.run("parts", *given, "--shard", "draft") == [0, 0], server.log()
    server.same("parts", "plain")
    early, wanted, last = (load_file(server.folder / name / "model.safetensors") for name in ("parts.step-3", "plain.step-3", "parts"))
    torch.testing.assert_close(early, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.equal(early["fc.weight"], last["fc.weight"]) and server.made("parts")[1][0]["measured"]["prompts"] == 2


def test_a_killed_training_goes_on_with_another_number_of_processes(server, alone):
    codes = server.run("killed", *EAGLE, "--shard", "all", strike="kill")
    assert codes == [6, -9], server.log()
    assert server.run("killed", *EAGLE, processes=1) == [0], server.log()
    assert len(server.made("killed")[1]) == 3  # of six steps
    server.same("killed", alone)


@pytest.mark.parametrize("shard", ["draft", "all"])
def test_an_error_of_one_ends_all(server, shard):
    assert server.run("failed", *EAGLE, "--shard", shard, strike="error") == [8, 8]
    assert server.log().startswith("error[AS-NUM-999] here") and server.log(1) == "" and not list(server.folder.glob(".failed*"))


def test_wrong_arguments_are_refused(tmp_path, monkeypatch, capsys):
    given = ["specdec", "train", "--model", "m", "--data", "d", "--draft", "eagle3", "--out", str(tmp_path / "o")]
    assert cli._guarded([*given, "--shard", "draft"]) == 2 and "one process" in capsys.readouterr().err
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli._guarded([*given, "--shard", "all", "--probe", "1"]) == 2 and "--probe" in capsys.readouterr().err


if __name__ == "__main__":
    serve()
