"""Conversion between layouts: the same weights to the last bit, or a refusal that leaves nothing behind."""

import json

import pytest
import torch

from angelslim_core import compress
from angelslim_core.cli import main as cli
from angelslim_core.conversion import convert
from angelslim_core.errors import NumericError, OutputError, PlanError, UsageError
from angelslim_core.source import open_any
from angelslim_core.validation import validate

GROUPS = ["steps[0].with.group_size=32"]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """made(pass, *overrides, **model): a compressed folder, made once."""
    done = {}

    def make(pass_id, *overrides, **model):
        key = (pass_id, overrides, *sorted(model.items()))
        if key not in done:
            done[key] = compress(tiny(**model), [pass_id], tmp_path_factory.mktemp("made") / "out", overrides=overrides).path
        return done[key]

    return make


def weights(folder):
    source = open_any(folder)
    return {
        name: source.read_quantized(m).dequantize() if (m := name.removesuffix(".weight")) in source.quantized else source.read(name) for name in source.dtypes
    }


def assert_same(a, b):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def stored(folder):
    checkpoint = open_any(folder).checkpoint
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_there_and_back(made, tmp_path, layout, symmetric):
    source = made("quant.int4_rtn", *GROUPS, f"steps[0].with.symmetric={symmetric}")
    found = convert(source, tmp_path / "there", layout)
    assert found["from"] == "compressed-tensors" and found["linears"] == 14
    assert open_any(tmp_path / "there").exporter.name == layout
    convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    assert_same(source, tmp_path / "there")
    assert_same(source, tmp_path / "back")
    assert validate(tmp_path / "there")["ok"] and validate(tmp_path / "back")["ok"]
    if layout == "gptq" or symmetric == "false":  # AWQ has a zero point even where none is needed
        first, second = stored(source), stored(tmp_path / "back")
        assert first.keys() == second.keys() and all(first[n].dtype == second[n].dtype and first[n].equal(second[n]) for n in first)
        config = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (source, tmp_path / "back")]
        assert config[0] == config[1]


def test_awq_to_gptq(made, tmp_path):
    source = made("quant.int4_rtn", *GROUPS, "steps[0].with.symmetric=false", "export.format=awq")
    convert(source, tmp_path / "out", "gptq")
    assert_same(source, tmp_path / "out")


def test_block_fp8(made, tmp_path):
    source = made("quant.fp8_block", "steps[0].with.block_size=32")
    first = open_any(source).exporter.name
    other = "compressed-tensors" if first == "fp8" else "fp8"
    convert(source, tmp_path / "there", other)
    convert(tmp_path / "there", tmp_path / "back", first)
    assert_same(source, tmp_path / "there")
    assert_same(source, tmp_path / "back")


@pytest.mark.parametrize("to", ["gptq", "awq", "fp8", "modelopt"])
def test_what_a_layout_cannot_hold(made, tmp_path, to):
    with pytest.raises(PlanError):
        convert(made("quant.int8_dynamic"), tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_scales_that_the_layout_would_round(made, tmp_path):
    with pytest.raises(PlanError, match="no F16 number"):
        convert(made("quant.int4_rtn", *GROUPS, dtype="float32"), tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())


def test_plain_models_and_unknown_layouts(tiny, tmp_path):
    with pytest.raises(PlanError, match="not quantized"):
        convert(tiny(), tmp_path / "out", "gptq")
    with pytest.raises(UsageError):
        convert(tiny(), tmp_path / "out", "zip")
    with pytest.raises(UsageError):
        convert(tiny(), tmp_path / "out", "gptq", "f16")
    assert not list(tmp_path.iterdir())


def test_nothing_is_dropped(made, tmp_path):
    import shutil

    folder = shutil.copytree(made("quant.int4_rtn", *GROUPS), tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="kv_cache_scheme"):
        convert(folder, tmp_path / "out", "gptq")


def test_whole_or_not_at_all(made, tmp_path, monkeypatch):
    from angelslim_core.exporters.gptq import GPTQ

    source = made("quant.int4_rtn", *GROUPS)
    plain = GPTQ.pack
    monkeypatch.setattr(GPTQ, "pack", lambda self, q: {**plain(self, q), "qweight": torch.zeros_like(plain(self, q)["qweight"])})
    with pytest.raises(NumericError, match="would not be the same weights"):
        convert(source, tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        convert(source, tmp_path / "out", "gptq")
    assert not list((tmp_path / "out").iterdir())


def test_command(made, tmp_path, capsys):
    source = made("quant.int4_rtn", *GROUPS)
    assert not cli._guarded(["convert", str(source), str(tmp_path / "out"), "--to", "awq", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1 and found["to"] == "awq" and found["path"] == str(tmp_path / "out")
    assert cli._guarded(["convert", str(source), str(tmp_path / "fp8"), "--to", "fp8"]) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
