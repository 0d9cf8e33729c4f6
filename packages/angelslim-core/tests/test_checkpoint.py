"""The header check and the reader, against files the safetensors library writes and files nobody should write."""

import errno
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core.errors import ModelError, ResourceError
from angelslim_core.io import writer as writer_module
from angelslim_core.io.checkpoint import Checkpoint, TensorSpec, read_bytes, read_header
from angelslim_core.io.strict_json import parse_object
from angelslim_core.io.writer import ShardWriter, keep_tensors, shard_name, split_shards, write_tensors
from angelslim_core.testing.models import split_shards as split_files


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_safetensors_wrote(tiny):
    folder = tiny()
    checkpoint, expected = Checkpoint.open(folder), load_file(folder / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.read(name, (3, 7)), expected[name][3:7])


def test_shards_and_index(tiny_copy):
    folder = tiny_copy()
    expected = load_file(folder / "model.safetensors")
    split_files(folder, 3)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(n), t) for n, t in expected.items())


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry()}, b"1234567", "has 61 bytes|where its header"),
        ({"a": entry()}, b"123456789", "where its header"),
        ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))}, b"0" * 12, "overlaps"),
        ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(12, 20))}, b"0" * 20, "hole"),
        ({"a": entry(dtype="X9")}, b"0" * 8, "impossible"),
        ({"a": entry(shape=(3,))}, b"0" * 8, "impossible"),
        ({"a": entry(shape=(-2,))}, b"0" * 8, "impossible"),
        ({"a": entry(shape=(True, 2))}, b"0" * 8, "impossible"),
        ({"a": {**entry(), "extra": 1}}, b"0" * 8, "impossible"),
        ({"a": [1]}, b"", "impossible"),
        (b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", b"0" * 8, "twice"),
        (b"[1]", b"", "no JSON object"),
        (b"{", b"", "not valid JSON"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, b"", "deeper"),
    ],
)
def test_malformed_headers(tmp_path, header, data, says):
    with pytest.raises(ModelError, match=says):
        read_header(header_file(tmp_path / "a.safetensors", header, data))


def test_length_beyond_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ModelError, match="truncated"):
        read_header(path)


def test_lfs_pointer(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="LFS"):
        read_header(path)


def test_file_that_shrinks_after_the_check(tiny_copy):
    folder = tiny_copy()
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    with pytest.raises(ModelError, match="changed"):
        checkpoint.read(last.name)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 31, 32, 33, 1000])
def test_tensors_are_read_in_parts(tmp_path, monkeypatch, size):
    monkeypatch.setattr("angelslim_core.io.checkpoint.PART", 8)
    monkeypatch.setattr("angelslim_core.io.checkpoint._CALL", 5)
    path = tmp_path / "data"
    path.write_bytes(bytes(i % 251 for i in range(size + 3)))
    assert bytes(read_bytes(path, 3, size).tolist()) == path.read_bytes()[3:]
    for beyond in (1, 600):  # ends in one part, in several
        with pytest.raises(ModelError, match="changed while it was read"):
            read_bytes(path, 3, size + beyond)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", ".a.safetensors"])
def test_index_is_confined(tiny_copy, file):
    folder = tiny_copy()
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    with pytest.raises(ModelError, match="plain"):
        Checkpoint.open(folder)


def test_link_out_of_the_folder(tiny_copy):
    folder = tiny_copy()
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "w.safetensors").symlink_to(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "w.safetensors")}))
    with pytest.raises(ModelError, match="outside"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(("change", "says"), [("missing shard", "missing"), ("missing tensor", "lacks"), ("extra tensor", "does not name")])
def test_index_against_headers(tiny_copy, change, says):
    folder = tiny_copy()
    split_files(folder, 2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    if change == "missing shard":
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif change == "missing tensor":
        weight_map["nobody.weight"] = "model-00001-of-00002.safetensors"
    else:
        weight_map.pop(next(iter(weight_map)))
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=says):
        Checkpoint.open(folder)


def test_pickle_alone_is_refused_and_beside_is_ignored(tiny_copy):
    folder = tiny_copy()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "modeling.py").write_text("raise SystemExit")
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.warnings) == 2 and not {p.name for p in checkpoint.companions} & {"pytorch_model.bin", "modeling.py"}
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled"):
        Checkpoint.open(folder)


def test_strict_json_strings_do_not_count_as_nesting():
    assert parse_object(b'{"a": "' + b"[" * 500 + b'"}', "x") == {"a": "[" * 500}


def test_writer_is_read_by_safetensors(tmp_path):
    tensors = {"a": torch.randint(-9, 9, (3, 5), dtype=torch.int8), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 3), "d": torch.zeros(0, 4)}
    specs = {"a": TensorSpec("I8", (3, 5)), "b": TensorSpec("BF16", (7,)), "c": TensorSpec("F32", (2, 3)), "d": TensorSpec("F32", (0, 4))}
    writer = ShardWriter(tmp_path / "m.safetensors", specs)
    for name in ("c", "a", "d", "b"):  # any order
        writer.write(name, tensors[name])
    writer.finish()
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o444 == 0o444


def test_writer_refuses_what_was_not_planned(tmp_path):
    writer = ShardWriter(tmp_path / "m.safetensors", {"a": TensorSpec("F32", (2,))})
    with pytest.raises(AssertionError):
        writer.write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="never written"):
        writer.finish()
    writer.close()


def test_full_disk_is_an_error_of_ours(tmp_path, monkeypatch):
    import os

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="needs"):
        ShardWriter(tmp_path / "m.safetensors", {"a": TensorSpec("F32", (2,))})


def test_shards_keep_units_whole():
    unit = {"w": TensorSpec("I8", (6,)), "s": TensorSpec("I8", (4,))}
    assert split_shards([unit] * 5, 20) == [[0, 1], [2, 3], [4]]
    assert split_shards([unit] * 2, 1) == [[0], [1]]
    assert shard_name(0, 1) == "model.safetensors" and shard_name(1, 3) == "model-00002-of-00003.safetensors"


def test_own_file_is_the_librarys_file(tmp_path):
    tensor = torch.randn(4, 4)
    save_file({"a": tensor}, tmp_path / "library.safetensors", metadata={"format": "pt"})
    writer = ShardWriter(tmp_path / "own.safetensors", {"a": TensorSpec("F32", (4, 4))})
    writer.write("a", tensor)
    writer.finish()
    assert load_file(tmp_path / "own.safetensors")["a"].equal(load_file(tmp_path / "library.safetensors")["a"])


def test_tensors_that_are_kept_are_there_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    keep_tensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int8)})
    before = path.read_bytes()
    assert write_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(2)}) == (tmp_path / "other.safetensors").stat().st_size

    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.ShardWriter, "write", full)
    with pytest.raises(ResourceError, match="cannot be written"):
        keep_tensors(path, {"a": torch.zeros(9)})
    assert path.read_bytes() == before
