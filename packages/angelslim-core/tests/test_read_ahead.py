"""Reading ahead of the pipeline."""

import os
import subprocess
import sys

import pytest

from angelslim_core.io import read_ahead
from angelslim_core.io.read_ahead import ReadAhead
from angelslim_core.testing.models import tiny_checkpoint


@pytest.fixture
def read(monkeypatch):
    """(file, offset, bytes) of every read."""
    found = []
    sendfile = os.sendfile

    def noted(to, of, offset, count):
        found.append((os.readlink(f"/proc/self/fd/{of}"), offset, sendfile(to, of, offset, count)))
        return found[-1][2]

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


def test_leaves_a_damaged_folder_to_the_pipeline(tmp_path, read):
    (tmp_path / "config.json").write_text("{}")
    with ReadAhead(1 << 30) as ahead:
        ahead.start(tmp_path)
        wait(ahead)
    assert read == []


def test_a_run_begins_before_torch_is_loaded(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path / "model")
    script = f"""
import sys
from angelslim_core import pipeline
class Noted(pipeline.ReadAhead):
    def start(self, folder):
        print(folder.name, "torch" in sys.modules)
        super().start(folder)
pipeline.ReadAhead = Noted
pipeline.compress({str(folder)!r}, ["quant.int8_dynamic"], {str(tmp_path / "out")!r})
"""
    pytest.importorskip("angelslim_quant")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["model", "False"]
