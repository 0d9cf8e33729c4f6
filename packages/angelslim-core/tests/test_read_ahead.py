"""Reading ahead of the pipeline."""

import os
import subprocess
import sys

import pytest

from angelslim_core import compress
from angelslim_core.io import read_ahead
from angelslim_core.io.read_ahead import ReadAhead
from angelslim_core.testing.models import tiny_checkpoint

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux sends files to nowhere")


@pytest.fixture
def read(monkeypatch):
    """(file, offset, bytes) of every read."""
    found = []
    sendfile = os.sendfile

    def noted(to, of, offset, count):
        sent = sendfile(to, of, offset, count)
        if os.readlink(f"/proc/self/fd/{to}") == os.devnull:  # copies of files go this way, too
            found.append((os.readlink(f"/proc/self/fd/{of}"), offset, sent))
        return sent

    monkeypatch.setattr(os, "sendfile", noted)
    return found


def wait(ahead):
    ahead._pool.shutdown()


def test_reads_every_byte_once_in_blocks(tmp_path, monkeypatch, read):
    monkeypatch.setattr(read_ahead, "BLOCK", 1000)
    folder = tiny_checkpoint("llama", tmp_path / "model")
    with ReadAhead(1 << 30) as ahead:
        ahead.start(folder)
        wait(ahead)
    file = folder / "model.safetensors"
    assert sorted(read) == [(str(file), start, min(1000, file.stat().st_size - start)) for start in range(0, file.stat().st_size, 1000)]


def test_reads_no_more_than_told(tmp_path, read):
    folder = tiny_checkpoint("llama", tmp_path / "model")
    with ReadAhead(1234) as ahead:
        ahead.start(folder)
        wait(ahead)
    assert [count for *_, count in read] == [1234]


def test_stops_with_its_context(tmp_path, monkeypatch, read):
    monkeypatch.setattr(read_ahead, "BLOCK", 1)
    with ReadAhead(1 << 30) as ahead:
        ahead.start(tiny_checkpoint("llama", tmp_path / "model"))
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert len(read) < size


def test_leaves_what_is_wrong_to_the_pipeline(tmp_path, read):
    inner = tmp_path / "model"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(b"x" * 100)
    (inner / "b.safetensors").symlink_to(tmp_path / "secret")  # out of the folder
    (inner / "a.safetensors").symlink_to("a.safetensors")
    (inner / "c.safetensors").mkdir()
    for folder in (inner, tmp_path / "none", tmp_path / "a/hub-id"):
        with ReadAhead(1 << 30) as ahead:
            ahead.start(folder)
            wait(ahead)
    assert read == []


def test_a_run_that_goes_on_reads_nothing_ahead(tmp_path, read):
    pytest.importorskip("angelslim_quant")
    folder = tiny_checkpoint("llama", tmp_path / "model")
    (tmp_path / ".out.angelslim").mkdir()
    compress(folder, ["quant.int8_dynamic"], tmp_path / "out")
    assert read == []
    compress(folder, ["quant.int8_dynamic"], tmp_path / "other")
    assert read


@pytest.mark.parametrize("use", [["quant.int8_dynamic"], None], ids=["pass", "plugin"])
def test_a_run_begins_before_torch_is_loaded(tmp_path, use):
    folder = tiny_checkpoint("llama", tmp_path / "model")
    script = f"""
import sys
from angelslim_core import pipeline
class Noted(pipeline.ReadAhead):
    def start(self, folder):
        print(str(folder).rpartition("/")[2], "torch" in sys.modules)
        super().start(folder)
pipeline.ReadAhead = Noted
pipeline.compress({str(folder)!r}, {use}, {str(tmp_path / "out")!r}, plugins=["quant"])
"""
    pytest.importorskip("angelslim_quant")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "model False"
