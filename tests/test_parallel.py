"""Several processes of one run: they make what one makes, end together, and go on where they ended.

The file is also a program: a server that imports the libraries once and forks the processes of each run, as torchrun
would start them, in one of which something happens at a layer or a shard.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from angelslim_core.io.checkpoint import Checkpoint

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ANGELSLIM_QUIET": "1", "CUDA_VISIBLE_DEVICES": ""}


def strike(what):
    """What happens to a process."""
    from angelslim_core.errors import NumericError

    if what == "error":
        raise NumericError(999, "here", "a number is not finite", "a hint")
    if what == "bug":
        raise ZeroDivisionError("division by zero")
    os.kill(os.getpid(), getattr(signal, what))


def serve():
    """Answer requests, one JSON document a line, until stdin ends."""
    from angelslim_core.cli import main as cli
    from angelslim_core.context import Context

    plain = Context.check_stop

    def child(request, rank):
        if request["processes"] > 1:
            size = str(request["processes"])
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(request["port"])
        with open(f"{request['log']}.{rank}", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)

        def check_stop(context, where):
            if rank == request["rank"] and where == request["where"]:
                strike(request["what"])
            plain(context, where)

        Context.check_stop = check_stop
        if request["telling"]:  # each linear that is compressed is a warning, and a fallback
            from angelslim_quant.passes.int8_dynamic import INT8Dynamic

            apply = INT8Dynamic.apply

            def telling(pass_, weights, context):
                names = [site.name for site in weights]
                context.warnings += names
                context.fallbacks += names
                return apply(pass_, weights, context)

            INT8Dynamic.apply = telling
        code = cli._guarded(request["arguments"])
        sys.stdout.flush()
        os._exit(code)

    for line in sys.stdin:
        request = json.loads(line)
        if request["here"]:  # imports what a run needs, for all that follow
            cli._guarded(request["arguments"])
        pids = [os.fork() or child(request, rank) for rank in range(request["processes"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"codes": codes}), file=sys.__stdout__, flush=True)


class Server:
    """Runs of `angelslim run` on one model."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        text = folder / "text.txt"
        words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "wizards", "mix", "a", "potion"]
        drawn = torch.randint(len(words), (4000,), generator=torch.Generator().manual_seed(0)).tolist()
        text.write_text(" ".join(words[i] for i in drawn))
        self.calibration = [f"--set=calibration.{o}" for o in (f"data={text}", "samples=12", "tokens=24", "batch_size=2")]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env={**os.environ, **ENVIRONMENT}, **pipe)
        assert self.run("warm", "quant.fp8_static", processes=0, here=True) == []

    def command(self, out, *steps):
        """Arguments of a run; a step is a pass id, with options after colons."""
        options = []
        for i, step in enumerate(steps):
            use, *given = step.split(":")
            options += ["--use", use, *(f"--set=steps[{i}].with.{o}" for o in given)]
        return [*map(str, ("run", "--model", self.model, "--out", self.folder / out, "--device", "cpu", *options, *self.calibration)), "--json"]

    def run(self, out, *steps, processes=2, rank=None, where="", what="", here=False, telling=False, more=()):
        """Exit codes by process."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        request = {
            "arguments": [*self.command(out, *steps), *more], "processes": processes, "port": port, "log": str(self.folder / "log"),
            "rank": rank, "where": where, "what": what, "here": here, "telling": telling,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith('{"codes"'):
            assert line, "the server died"
        return json.loads(line)["codes"]

    def log(self, rank):
        return Path(f"{self.folder / 'log'}.{rank}").read_text()

    def document(self):
        """The last run's `--json` document."""
        return json.loads(self.log(0)[self.log(0).index('{"schema_version"') :].splitlines()[0])

    def weights(self, out):
        return {p.name: p.read_bytes() for p in (self.folder / out).glob("*.safetensors")}

    def remove(self, out):
        shutil.rmtree(self.folder / out)

    def left(self, out):
        return [p.name for p in self.folder.iterdir() if out in p.name]


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    server = Server(tiny(dtype="float32", num_hidden_layers=3), tmp_path_factory.mktemp("parallel"))
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=60)


# a tie that tips in one linear of the random model changes what all after it see
SAME = 0.9


def agreement(one, two):
    """Share of equal codes and of scales that are equal but for their last bits."""
    a, b = Checkpoint.open(one), Checkpoint.open(two)
    assert a.tensors.keys() == b.tensors.keys()
    same = []
    for name, info in a.tensors.items():
        x, y = a.read(name), b.read(name)
        if info.dtype == "I32":  # packed codes
            x, y = (torch.stack([(t >> shift) & 15 for shift in range(0, 32, 4)]) for t in (x, y))
        close = torch.isclose(x, y, rtol=1e-3, atol=1e-5) if info.dtype == "F32" else x.view(torch.uint8) == y.view(torch.uint8)
        same.append(close.flatten())
    return float(torch.cat(same).float().mean())


@pytest.mark.parametrize("observer", ["absmax", "ema", "histogram"])
def test_maxima_and_counts_give_the_same_bytes(server, observer):
    step = f"quant.fp8_static:observer={observer}"
    assert server.run(f"one-{observer}", step, processes=1) == [0], server.log(0)
    assert server.run(f"two-{observer}", step) == [0, 0], server.log(0)
    assert server.weights(f"two-{observer}") == server.weights(f"one-{observer}")
    assert server.log(1) == ""
    assert len(server.log(0).splitlines()) == 1 and server.document()["passes"][0]["id"] == "quant.fp8_static"


@pytest.mark.parametrize(
    "steps",
    [
        ["quant.gptq:group_size=16"], ["quant.gptaq:group_size=16"], ["quant.awq:group_size=16"], ["quant.smooth", "quant.int8_dynamic"],
        ["quant.nvfp4"], ["quant.w4a8_int8:group_size=16"], ["quant.w4a8_fp8:group_size=16"], ["quant.learned_rounding:group_size=16:iterations=8:start=nearest"],
    ],
    ids=lambda steps: steps[0].partition(":")[0],
)  # fmt: skip
def test_sums_differ_in_their_order_only(server, steps):
    name = steps[0].partition(":")[0]
    assert server.run(f"one-{name}", *steps, processes=1) == [0], server.log(0)
    assert server.run(f"two-{name}", *steps) == [0, 0], server.log(0)
    assert agreement(server.folder / f"one-{name}", server.folder / f"two-{name}") > SAME


def test_shares_need_not_be_equal(server):
    step = "quant.gptq:group_size=16"
    assert server.run("one-uneven", step, processes=1) == [0], server.log(0)
    assert server.run("four-uneven", step, processes=4) == [0] * 4, server.log(0)  # of six batches
    assert agreement(server.folder / "one-uneven", server.folder / "four-uneven") > SAME


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_ends_all(server, rank):
    assert server.run("failed", "quant.gptq:group_size=16", rank=rank, where="layer 1", what="error") == [8, 8]
    assert server.log(0).splitlines()[:2] == ["error[AS-NUM-999] here: a number is not finite", "hint: a hint"]
    assert server.log(1) == "" and server.left("failed") == []


def test_a_bug_of_one_ends_all(server):
    assert server.run("broken", "quant.gptq:group_size=16", rank=1, where="layer 1", what="bug") == [1, 1]
    assert "process 1: ZeroDivisionError: division by zero" in server.log(0) and server.left("broken") == []


def test_an_output_that_exists_is_refused_once(server):
    (server.folder / "taken").mkdir()
    assert server.run("taken", "quant.fp8_static") == [7, 7]
    assert server.log(0).count("error[") == 1 and server.log(1) == ""


def test_more_processes_than_batches_are_refused(server):
    assert server.run("few", "quant.fp8_static", more=["--set", "calibration.batch_size=12"]) == [2, 2]
    assert "2 processes share 1 batches" in server.log(0) and server.left("few") == []


@pytest.mark.parametrize(("rank", "what"), [(0, "SIGKILL"), (1, "SIGKILL"), (1, "SIGTERM")])
def test_a_run_that_ended_goes_on(server, rank, what):
    step, name = "quant.gptaq:group_size=16", f"ended-{rank}-{what}"
    if not (server.folder / "whole").exists():
        assert server.run("whole", step) == [0, 0], server.log(0)
    codes = server.run(name, step, rank=rank, where="layer 2", what=what)
    if what == "SIGKILL":
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 6
    else:
        assert codes == [75, 75]
    assert server.left(name) == [f".{name}.angelslim"]
    assert server.run(name, step) == [0, 0], server.log(0)
    assert server.document()["resumed_layers"] == 1  # the second was done, but not all had said that it is on disk
    assert server.weights(name) == server.weights("whole") and server.left(name) == [name]


def test_another_number_of_processes_goes_on(server):
    step = "quant.fp8_static"
    assert server.run("one-of-two", step, rank=0, where="layer 2", what="SIGKILL")[0] == -signal.SIGKILL
    assert server.run("one-of-two", step, processes=1) == [0], server.log(0)
    assert server.document()["resumed_layers"] == 1  # the second was done, but not all had said that it is on disk
    assert server.run("one-of-one", step, processes=1) == [0], server.log(0)
    assert server.weights("one-of-two") == server.weights("one-of-one")


SHARDS = ["--set", "export.max_shard=20kB"]
INT8 = "quant.int8_dynamic"


@pytest.fixture(scope="module")
def free(server):
    """Output of one process without calibration, and its number of shards."""
    assert server.run("free", INT8, processes=1, more=SHARDS) == [0], server.log(0)
    return "free", len(server.weights("free"))


def shard(free, number):
    return f"model-{number:05}-of-{free[1]:05}.safetensors"


def records(server, out):
    folder = server.folder / out / "angelslim"
    metrics = json.loads((folder / "metrics.json").read_text())
    sums = {line for line in (folder / "SHA256SUMS").read_text().splitlines() if line.endswith(".safetensors")}
    return metrics["linears"], sums, json.loads((folder / "analysis.json").read_text())


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_are_shared_and_their_bytes_the_same(server, free, processes):
    name = f"free-{processes}"
    assert server.run(name, INT8, processes=processes, more=SHARDS) == [0] * processes, server.log(0)
    assert server.document()["processes"] == processes and server.document()["peak_ram_bytes"] > 0
    assert server.weights(name) == server.weights("free") and records(server, name) == records(server, "free")
    assert list(records(server, name)[0]) == list(records(server, "free")[0])  # in the same order
    assert server.left(name) == [name] and all(server.log(rank) == "" for rank in range(1, processes))


def test_a_process_without_a_shard_waits(server):
    assert server.run("single", INT8, processes=1) == [0] and server.run("idle", INT8) == [0, 0], server.log(0)
    assert server.weights("idle") == server.weights("single") and len(server.weights("idle")) == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["error", "bug"])
def test_an_error_at_a_shard_ends_all(server, free, rank, what):
    code = 8 if what == "error" else 1
    for number in range(1, free[1] + 1):  # one of them is this process's
        codes = server.run("lost", INT8, rank=rank, where=shard(free, number), what=what, more=SHARDS)
        if codes != [0, 0]:
            break
        server.remove("lost")
    assert codes == [code, code] and server.left("lost") == []
    assert server.log(0).count("error[") == 1 and (what == "bug" or server.log(1) == "")


@pytest.mark.parametrize("heard", [True, False])
def test_a_process_does_not_go_on_once_another_has_failed(tiny, tmp_path, monkeypatch, heard):
    """It hears of it between two units, not after its last shard; its threads have ended before the work folder may go."""
    from angelslim_core import compress, stream
    from angelslim_core.errors import NumericError, ResourceError
    from angelslim_core.parallel import Group

    done = []

    class Failing(Group):
        def is_over(self):
            return len(done) == 2

        def gather(self, value):
            if len(done) == 2:
                assert not [t.name for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
                if heard:
                    raise NumericError(999, "there", "another's")
            return [value]

    plain = stream._process
    monkeypatch.setattr(stream, "_process", lambda *args: (done.append(args), plain(*args))[1])
    monkeypatch.setattr("angelslim_core.context.Group", Failing)
    monkeypatch.setattr("angelslim_core.parallel.Group", Failing)
    with pytest.raises(NumericError if heard else ResourceError, match="another's" if heard else "lost their connection"):
        compress(tiny(), [INT8], tmp_path / "o", overrides=["export.max_shard=20kB"])
    assert len(done) == 2 and not (tmp_path / "o").exists()


@pytest.mark.parametrize(("before", "after", "rank", "what"), [(3, 2, 1, "SIGKILL"), (2, 3, 0, "SIGKILL"), (2, 1, 1, "SIGTERM"), (1, 2, 0, "SIGTERM")])
def test_shards_that_are_done_are_kept_by_another_number_of_processes(server, free, before, after, rank, what):
    name = f"kept-{before}-{after}"
    for number in range(free[1], 0, -1):  # the last of this process's, again and again
        codes = server.run(name, INT8, processes=before, rank=rank, where=shard(free, number), what=what, telling=True, more=SHARDS)
        if codes != [0] * before:
            break
        server.remove(name)
    assert codes[rank] == (-signal.SIGKILL if what == "SIGKILL" else 75)
    kept = [json.loads(line) for path in (server.folder / f".{name}.angelslim").glob("journal*.jsonl") for line in path.read_text().splitlines()]
    assert kept and len(kept) < free[1]
    written = {path.name: path.stat().st_mtime_ns for path in (server.folder / f".{name}.angelslim/stage").glob("*.safetensors")}
    assert server.run(name, INT8, processes=after, telling=True, more=SHARDS) == [0] * after, server.log(0)
    assert server.weights(name) == server.weights("free") and records(server, name) == records(server, "free")
    for entry in kept:
        assert (server.folder / name / entry["shard"]).stat().st_mtime_ns == written[entry["shard"]]  # not made again
    linears = records(server, "free")[0]
    assert sorted(server.document()["warnings"][1:]) == sorted(linears) and server.document()["fallbacks"] == len(linears)


def test_layers_and_shards_go_on(server):
    """Layers a sweep left are read by all processes; another number of them goes on after a kill at a shard."""
    step = "quant.fp8_static"
    assert server.run("swept", step, processes=1, more=SHARDS) == [0], server.log(0)
    count = len(server.weights("swept"))
    for number in range(count, 0, -1):
        if server.run("swept-2", step, rank=1, where=shard(("", count), number), what="SIGKILL", more=SHARDS) != [0, 0]:
            break
        server.remove("swept-2")
    assert server.run("swept-2", step, processes=3, more=SHARDS) == [0, 0, 0], server.log(0)
    assert server.document()["resumed_layers"] == 3 and server.weights("swept-2") == server.weights("swept")


def test_torchrun(server):
    command = [
        Path(sys.executable).with_name("torchrun"),
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "angelslim_core",
        *server.command("torchrun", "quant.fp8_static"),
    ]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["path"] == str(server.folder / "torchrun")
    assert server.run("no-torchrun", "quant.fp8_static", processes=1) == [0]
    assert server.weights("torchrun") == server.weights("no-torchrun")


if __name__ == "__main__":
    serve()
