"""Runs that are killed, stopped, crowded out or met by a full disk, at any write: the same command then makes the same bytes.

The file is also a program: a server that imports the libraries once and forks a process for each `angelslim run`, in
which something happens at the k-th change to the disk.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

TENSOR, LAYER = "quant.int8_dynamic", "quant.fp8_static"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ANGELSLIM_QUIET": "1"}


def intercept(folder, at, what, only):
    """Count the changes to the disk under `folder`; at number `at`, send ourselves the signal `what` or fail like a full disk.

    Layers are written by a thread: what it does in which order is certain, but not between which of the others' changes.

    Args:
        only: count changes of this name, or all.

    Returns:
        a list that grows by the name of each change.
    """
    seen = []
    lock = threading.Lock()

    def step(name, before_signal=None):
        with lock:
            seen.append(name)
            reached = len(seen) if not only else seen.count(only) if name == only else 0
        if reached != at:
            return
        if what == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if before_signal:
            before_signal()
        os.kill(os.getpid(), getattr(signal, what))

    def audit(event, args):
        if event == "open":
            flags = args[2] or 0
            # a nameless file, by which filelock learns what modes a folder takes, is no change and may fail
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and flags & os.O_TMPFILE != os.O_TMPFILE
        elif event == "os.mkdir":
            writes = not Path(args[0]).exists()
        else:
            writes = event in {"os.rename", "os.remove", "os.rmdir", "os.chmod"}
        if writes and isinstance(args[0], str | os.PathLike) and (Path(args[0]).is_relative_to(folder) or event in {"os.remove", "os.rmdir"}):
            step(f"{event} {Path(args[0]).parent.name}" if event == "os.rename" else event)

    sys.addaudithook(audit)
    pwrite, fsync, fallocate = os.pwrite, os.fsync, os.posix_fallocate

    def torn_pwrite(descriptor, data, offset):
        step("pwrite", lambda: pwrite(descriptor, data[: len(data) // 2], offset))
        return pwrite(descriptor, data, offset)

    os.pwrite = torn_pwrite
    os.fsync = lambda descriptor: (step("fsync"), fsync(descriptor))[1]
    os.posix_fallocate = lambda *args: (step("fallocate"), fallocate(*args))[1]
    return seen


def serve():
    """Answer requests, one JSON document a line, until stdin ends."""
    from angelslim_core.cli import main as cli

    def child(request):
        with open(request["log"], "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        seen = intercept(Path(request["folder"]), request["at"], request["what"], request["only"])
        code = cli._guarded(request["arguments"])
        sys.stdout.flush()
        if request["count"]:
            Path(request["count"]).write_text(json.dumps(seen))
        os._exit(code)

    for line in sys.stdin:
        request = json.loads(line)
        pid = request.get("pid")
        if not pid:
            if request["here"]:  # imports what a run needs, for all that follow
                cli._guarded(request["arguments"])
            pid = os.fork() or child(request)
        _, status = os.waitpid(pid, os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        print(json.dumps({"pid": pid, "code": None if stopped else os.waitstatus_to_exitcode(status)}), file=sys.__stdout__, flush=True)


class Server:
    """Runs of `angelslim run` on one model, each in a process and with an output of its own."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env={**os.environ, **ENVIRONMENT}, **pipe)
        self.whole, self.changes = {}, {}
        for kind in (TENSOR, LAYER):
            self.run(kind, f"warm-{kind}", here=True)
            assert self.run(kind, kind)[0] == 0, self.log
            self.whole[kind] = self.weights(kind)
            self.changes[kind] = json.loads((folder / "count").read_text())

    def run(self, kind, out, what="", at=0, *arguments, here=False, only=""):
        """(exit code, or None for a run that is stopped by SIGSTOP; its process id)."""
        options = ["--set", "export.max_shard=100kB"]
        if kind == LAYER:
            options += [f"--set=calibration.{o}" for o in (f"data={self.folder / 'text.txt'}", "samples=2", "tokens=16")]
        command = ["run", "--use", kind, "--model", self.model, "--out", self.folder / out, "--device", "cpu", *options, *arguments, "--json"]
        return self.ask({
            "arguments": list(map(str, command)), "folder": str(self.folder), "what": what, "at": at, "only": only, "here": here,
            "log": str(self.folder / f"{out}.log"), "count": None if at else str(self.folder / "count"),
        }, out)  # fmt: skip

    def ask(self, request, out=""):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith('{"pid"'):
            assert line, "the server died"
        answer = json.loads(line)
        log = self.folder / f"{out}.log"
        self.log = log.read_text() if log.is_file() else ""
        return answer["code"], answer["pid"]

    def go_on(self, pid, out):
        """Continue a stopped run to its end; its exit code."""
        os.kill(pid, signal.SIGCONT)
        return self.ask({"pid": pid}, out)[0]

    def document(self):
        """The last run's `--json` document."""
        return json.loads(self.log[self.log.index('{"schema_version"') :].splitlines()[0])

    def weights(self, out):
        return {p.name: p.read_bytes() for p in (self.folder / out).glob("*.safetensors")}

    def is_whole(self, out, kind):
        """Whether an output is complete: its weights, and every file its list of checksums names."""
        listed = {line.split("  ", 1)[1] for line in (self.folder / out / "angelslim/SHA256SUMS").read_text().splitlines()}
        found = {p.relative_to(self.folder / out).as_posix() for p in (self.folder / out).rglob("*") if p.is_file()}
        return self.weights(out) == self.whole[kind] and found == listed | {"angelslim/SHA256SUMS"}

    def finish(self, kind, out, *arguments):
        """Give the command again: it makes what an undisturbed run makes, and leaves nothing beside it."""
        code, _ = self.run(kind, out, "", 0, *arguments)
        assert code == 0, self.log
        assert self.is_whole(out, kind)
        assert not [p.name for p in self.folder.iterdir() if p.name.startswith(f".{out}.")]

    def spread(self, kind, count):
        """Numbers of changes, evenly over the whole run, the first and the last among them."""
        last = len(self.changes[kind])
        return sorted({1 + round(i * (last - 1) / (count - 1)) for i in range(count)})

    def number(self, kind, name, occurrence=0):
        """Number of a change of that name."""
        return 1 + [i for i, change in enumerate(self.changes[kind]) if change == name][occurrence]


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    server = Server(tiny(num_hidden_layers=4), tmp_path_factory.mktemp("crash"))
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=10)


@pytest.mark.parametrize("kind", [TENSOR, LAYER])
def test_a_killed_run_leaves_no_half_output_and_is_finished_by_the_same_command(server, kind):
    for at in [*server.spread(kind, 11), server.number(kind, "os.rename angelslim", -1)]:  # the last: checksums written and not yet in place
        out = f"killed-{kind}-{at}"
        assert server.run(kind, out, "SIGKILL", at)[0] == -signal.SIGKILL
        if (server.folder / out).exists():  # the kill came after it was published
            assert at > server.number(kind, "os.chmod") and server.is_whole(out, kind)
            assert server.run(kind, out)[0] == 7
            assert not (server.folder / f".{out}.angelslim").exists()
        else:
            server.finish(kind, out)


def test_a_run_killed_again_and_again_goes_on(server):
    kills = 0
    while server.run(LAYER, "often", "SIGKILL", 75)[0]:
        assert not (server.folder / "often").exists() or server.is_whole("often", LAYER)
        kills += 1
        assert kills < 20
    assert kills > 2 and server.is_whole("often", LAYER)


def test_finished_layers_are_not_done_again(server):
    for what, at, layers in (("layers", 1, 0), ("layers", 2, 1), ("layers", 4, 3), ("stage", 1, 4)):
        out = f"resumed-{layers}"
        assert server.run(LAYER, out, "SIGKILL", at, only=f"os.rename {what}")[0] == -signal.SIGKILL
        server.finish(LAYER, out)
        assert server.document()["resumed_layers"] == layers


def test_work_without_a_manifest_is_of_no_use(server):
    """A crash while a work folder is removed may leave the journal of another recipe in it."""
    late = [i for i, name in enumerate(server.changes[LAYER], 1) if name.startswith("os.rename")]
    other = ["--set", "calibration.samples=1"]
    assert server.run(LAYER, "other", "", 0, *other)[0] == 0
    assert server.run(LAYER, "stale", "SIGKILL", late[8])[0] == -signal.SIGKILL
    (server.folder / ".stale.angelslim/manifest.json").unlink()
    assert server.run(LAYER, "stale", "SIGKILL", late[2], *other)[0] == -signal.SIGKILL
    assert server.run(LAYER, "stale", "", 0, *other)[0] == 0
    assert server.weights("stale") == server.weights("other") != server.whole[LAYER]


def test_a_kill_while_replacing_leaves_the_old_or_the_new_output(server):
    assert server.run(TENSOR, "replaced")[0] == 0
    chmod = server.number(LAYER, "os.chmod")
    seen = set()
    for later in (0, 1, 2, 3, 10, 20):
        code, _ = server.run(LAYER, "replaced", "SIGKILL", chmod + later, "--replace")
        assert code == -signal.SIGKILL
        whole = [kind for kind in (TENSOR, LAYER) if (server.folder / "replaced").exists() and server.is_whole("replaced", kind)]
        assert whole or not (server.folder / "replaced").exists()
        seen.update(whole or ["absent"])
        for kind in (LAYER, TENSOR):
            server.finish(kind, "replaced", "--replace")
    assert seen == {TENSOR, LAYER, "absent"}


@pytest.mark.parametrize("kind", [TENSOR, LAYER])
def test_sigterm_stops_safely(server, kind):
    codes = []
    for at in server.spread(kind, 7):
        out = f"stopped-{kind}-{at}"
        codes.append(server.run(kind, out, "SIGTERM", at)[0])
        if codes[-1]:
            assert not (server.folder / out).exists()
            assert re.search(r"^error\[AS-STP-\d{3}\] .*\nhint: ", server.log, re.M) and "Traceback" not in server.log
            server.finish(kind, out)
        else:  # nothing was left to stop
            assert server.is_whole(out, kind)
    assert set(codes) == {0, 75} and codes == sorted(codes, reverse=True) and codes.count(75) > 3


def test_a_second_run_is_refused_and_the_first_is_not_disturbed(server):
    for kind in (TENSOR, LAYER):
        for at in [at for at in server.spread(kind, 5) if at > 2]:
            out = f"shared-{kind}-{at}"
            code, first = server.run(kind, out, "SIGSTOP", at)
            assert code is None
            for second in (LAYER, TENSOR):
                assert server.run(second, out)[0] == 7 and re.search(r"^error\[AS-OUT-\d{3}\] ", server.log, re.M)
            assert server.go_on(first, out) == 0
            assert server.is_whole(out, kind) and not (server.folder / f".{out}.angelslim").exists()


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_overtaken_before_it_has_the_lock_leaves_the_output_alone(server, at):
    out = f"overtaken-{at}"
    _, first = server.run(TENSOR, out, "SIGSTOP", at)
    server.finish(LAYER, out)
    assert server.go_on(first, out) == 7
    assert server.is_whole(out, LAYER)


@pytest.mark.parametrize("kind", [TENSOR, LAYER])
def test_a_full_disk_is_an_error_of_one_line(server, kind):
    published = server.number(kind, "os.chmod")
    for at in [2, *(at for at in server.spread(kind, 11) if at < published and server.changes[kind][at - 1] != "os.remove")]:  # 2: the lock
        out = f"full-{kind}-{at}"
        code, _ = server.run(kind, out, "ENOSPC", at)
        assert code == 6, (at, server.changes[kind][at - 1], server.log)
        errors = [line for line in server.log.splitlines() if not line.startswith(("hint: ", '{"schema_version"', "["))]
        assert len(errors) == 1 and re.match(r"error\[AS-RES-\d{3}\] .*No space left", errors[0]), server.log
        assert not (server.folder / out).exists()
        server.finish(kind, out)


if __name__ == "__main__":
    serve()
