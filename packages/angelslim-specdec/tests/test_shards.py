"""Features on disk: the same as those computed, refused where they are of something else, and written shard by shard."""

import json
import shutil

import pytest
import torch

from angelslim_core.calibration.packing import pack
from angelslim_core.calibration.spans import Document
from angelslim_core.cli.main import main
from angelslim_core.errors import ModelError, StoppedError
from angelslim_core.loading import load_model
from angelslim_specdec.data.shards import Manifest, Shards
from angelslim_specdec.target import Target
from angelslim_specdec.training.dump import dump
from angelslim_specdec.training.features import Source, computed, stored

LAYERS = (0, 1)


@pytest.fixture(scope="module")
def target(tiny):
    loaded = load_model(tiny(), "cpu")
    return Target(loaded.model, loaded.tokenizer)


def rows():
    generator = torch.Generator().manual_seed(0)
    sizes = [9, 17, 30, 21, 12, 5]
    return pack([Document(torch.randint(3, 250, (n,), generator=generator).tolist(), [False] * 2 + [True] * (n - 2)) for n in sizes], 32)


def manifest(target):
    return Manifest(
        fingerprint=target.shape.fingerprint, layer_ids=LAYERS, hidden_size=64, dtype="BF16", template="t", data="d", length=32, turns="joined", seed=0
    )


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "f"
    dump(target, rows(), manifest(target), out, shard_tokens=50)
    return out


def test_shards_give_what_the_target_computes(target, folder):
    made = rows()
    shards = Shards(folder, {"fingerprint": target.shape.fingerprint, "data": "d"})
    assert len(shards.manifest.shards) > 1 and shards.manifest.tokens == sum(map(len, made)) == 94
    options = (torch.device("cpu"), torch.float32)
    numbers = list(range(len(made)))
    online = Source(made, computed(target, made, LAYERS), *options)
    offline = Source(shards.rows, stored(shards), *options)
    for at in ([1, 0], numbers, [0], [1], [3]):
        a, b = online.batch(at), offline.batch(at)
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("ids", "loss_mask", "documents", "positions"))
        torch.testing.assert_close(a.aux, b.aux, rtol=0.02, atol=0.02)  # BF16, in batches of other sizes
        torch.testing.assert_close(a.final, b.final, rtol=0.02, atol=0.02)
    alone = online.batch([2])
    assert torch.equal(alone.aux, offline.batch([2]).aux) and torch.equal(alone.final, offline.batch([2]).final)


def test_a_killed_dump_goes_on(target, folder, tmp_path):
    count = iter(range(9))
    with pytest.raises(StoppedError):
        dump(target, rows(), manifest(target), tmp_path / "f", shard_tokens=50, stop_requested=lambda: next(count) == 0)
    stamp = (tmp_path / ".f.angelslim/stage/features-00000.safetensors").stat().st_mtime_ns
    dump(target, rows(), manifest(target), tmp_path / "f", shard_tokens=50)
    assert (tmp_path / "f/features-00000.safetensors").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "f" / path.name).read_bytes()


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda f: (f / "manifest.json").unlink(), "cannot be read"),
        (lambda f: edit(f, hidden_size="x"), "hidden_size"),
        (lambda f: edit(f, fingerprint="other"), "another fingerprint"),
        (lambda f: edit(f, rows=99), "manifest says 99"),
        (lambda f: edit(f, layer_ids=[0]), "does not hold the tensors"),
        (lambda f: edit(f, dtype="F32"), "does not hold the tensors"),
        (lambda f: (f / "features-00001.safetensors").unlink(), "has 0 bytes"),
        (lambda f: (f / "features-00001.safetensors").write_bytes((f / "features-00001.safetensors").read_bytes()[:-7]), "bytes where the manifest says"),
        (lambda f: edit(f, shards=[{"file": "../../etc/passwd", "nbytes": 1, "rows": 1, "tokens": 1}]), "shards.0.file"),
    ],
    ids=["absent", "type", "target", "rows", "layers", "dtype", "missing", "truncated", "path"],
)
def test_features_of_something_else_are_refused(target, folder, tmp_path, spoil, what):
    copy = shutil.copytree(folder, tmp_path / "f")
    spoil(copy)
    with pytest.raises(ModelError, match=what):
        Shards(copy, {"fingerprint": target.shape.fingerprint})


def cli(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["specdec", *map(str, arguments)])
    return ended.value.code


def test_a_draft_trained_from_disk_is_the_one_trained_beside_its_target(tiny, tmp_path, capsys):
    model = tiny(dtype="float32", num_hidden_layers=4)
    chats = tmp_path / "c.jsonl"
    said = ["a thing of things", "because it was and is", "nobody knows for sure"]
    chats.write_text("".join(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]}) + "\n" for a in said))
    common = ("--model", model, "--draft", "eagle3", "--device", "cpu")
    assert cli("dump", *common, "--data", chats, "--out", tmp_path / "f", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layer_ids"] == [0, 1, 1]
    train = ("train", *common, "--steps", 4, "--draft-vocab", 40, "--set", "ttt_steps=2", "--json")
    assert cli(*train, "--data", chats, "--out", tmp_path / "online", "--keep", "nowhere") == 0
    assert cli(*train, "--features", tmp_path / "f", "--out", tmp_path / "offline") == 0
    assert (tmp_path / "online/model.safetensors").read_bytes() == (tmp_path / "offline/model.safetensors").read_bytes()
    capsys.readouterr()
    other = tiny("qwen3", dtype="float32", num_hidden_layers=4)
    assert cli("train", "--model", other, *common[2:], "--features", tmp_path / "f", "--out", tmp_path / "x") == 5
    assert "another fingerprint" in capsys.readouterr().err
    assert cli(*train, "--features", tmp_path / "f", "--set", "aux_hidden_state_layer_ids=[2]", "--out", tmp_path / "x") == 5
    assert "the draft reads [2]" in capsys.readouterr().err
