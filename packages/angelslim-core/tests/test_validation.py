"""`validate`: what a saved folder must satisfy, each check against a folder that breaks it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core import compress
from angelslim_core.exporters.compressed_tensors import CompressedTensors
from angelslim_core.exporters.modelopt import ModelOpt, nvfp4_scheme
from angelslim_core.schemes import Grid, Quantized, Scheme, dequantize
from angelslim_core.second_reader import SecondReader, shared_scales
from angelslim_core.validation import validate

UP = "model.layers.0.mlp.up_proj"


def quantized(model, out, use, *overrides, **options):
    compress(model, [use], out, overrides=overrides, **options)
    (out / "angelslim/SHA256SUMS").unlink()  # the folder is changed below
    return out


def change(out, **tensors):
    """Set tensors; None removes one."""
    stored = load_file(out / "model.safetensors")
    for name, value in tensors.items():
        if value is None:
            del stored[name]
        else:
            stored[name] = value(stored[name]) if callable(value) else value
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})


def configure(out, **changes):
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].update(changes)
    (out / "config.json").write_text(json.dumps(config))


def says(out, *words, **options):
    found = validate(out, **options)
    assert not found["ok"] and any(all(w in p for w in words) for p in found["problems"]), found["problems"]
    return found


CALIBRATION = ("calibration.data=self", "calibration.samples=2", "calibration.tokens=16")


@pytest.mark.parametrize(
    ("use", "to"),
    [
        ("quant.int8_dynamic", None), ("quant.fp8_dynamic", None), ("quant.fp8_block", None), ("quant.int4_rtn", None), ("quant.int4_rtn", "gptq"),
        ("quant.int4_rtn", "awq"),
    ],
)  # fmt: skip
def test_a_good_folder_is_read_alike_by_both_readers(tiny, tmp_path, use, to):
    more = {"quant.int4_rtn": ("steps[0].with.group_size=32", "steps[0].with.symmetric=false"), "quant.fp8_block": ("steps[0].with.block_size=32",)}
    quantized(tiny(), tmp_path / "out", use, *more.get(use, ()), *([f"export.format={to}"] if to else []))
    found = validate(tmp_path / "out", tiny())
    assert found["ok"], found["problems"]
    assert found["readers"] == {"linears": 14, "second": True, "differ": []} and len(found["linears"]) == 14
    assert all(row["cosine"] > 0.98 for row in found["linears"])
    assert found["unquantized"] == [{"name": "lm_head", "role": "head", "ignored": True}]
    assert found["engines"]["vllm"]["ok"] is (to != "gptq") and not found["engines"]["llama.cpp"]["ok"]  # vLLM reads symmetric GPTQ only


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_second_reader_unpacks_every_width(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    scheme = Scheme("int", Grid(bits, "int", "group", 32, symmetric=symmetric))
    codes = torch.randint(-half, half, (24, 96), generator=generator, dtype=torch.int8)
    zero = None if symmetric else torch.randint(-half, half, (24, 3), generator=generator, dtype=torch.int8)
    original = Quantized(scheme, codes, torch.rand(24, 3, generator=generator) + 0.1, zero)
    exporter = CompressedTensors()
    read = SecondReader(exporter.config({"m": scheme}, [])).weight("m", exporter.pack(original))
    assert read.equal(dequantize(codes, original.scale, zero, scheme.weights))


@pytest.mark.parametrize("kind", ["nvfp4", "modelopt", "mxfp4", "mxfp8"])
def test_the_second_reader_knows_fp4_and_mx(kind):
    generator = torch.Generator().manual_seed(0)
    if kind in ("nvfp4", "modelopt"):
        scheme, t = nvfp4_scheme(False), torch.tensor([0.037])
        scale = (torch.rand(16, 4, generator=generator) * 400).to(torch.float8_e4m3fn)
    else:
        scheme, t = Scheme(kind, Grid(int(kind[-1]), "float", "group", 32, scale_dtype="U8")), None
        scale = torch.randint(120, 130, (16, 2), generator=generator, dtype=torch.uint8)
    if kind == "mxfp8":
        codes = torch.randn(16, 64, generator=generator).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 16, (16, 64), generator=generator, dtype=torch.uint8)
    original = Quantized(scheme, codes, scale, global_scale=t)
    exporter = ModelOpt() if kind == "modelopt" else CompressedTensors()
    read = SecondReader(exporter.config({"m": scheme}, [])).weight("m", exporter.pack(original))
    assert torch.allclose(read, original.dequantize(), rtol=1e-6, atol=0) and read.abs().max() > 0


def test_numbers_by_hand():
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, "format": "nvfp4-pack-quantized"}
    reader = SecondReader({"quant_method": "compressed-tensors", "config_groups": {"g": group}})
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    parts = {"weight_packed": packed, "weight_scale": torch.tensor([[3.0]]).to(torch.float8_e4m3fn), "weight_global_scale": torch.tensor([2.0])}
    ladder = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert reader.weight("m", parts).tolist() == [[1.5 * v for v in (*ladder, *(-v for v in ladder))]]


def test_readers_that_disagree_are_named(tiny, tmp_path, monkeypatch):
    out = quantized(tiny(), tmp_path / "out", "quant.int8_dynamic")
    right = CompressedTensors.unpack

    def wrong(self, tensors, scheme):
        read = right(self, tensors, scheme)
        read.scale = read.scale.float() * 1.001
        return read

    monkeypatch.setattr(CompressedTensors, "unpack", wrong)
    found = says(out, UP, "two readers")
    assert UP in found["readers"]["differ"]


def test_a_folder_that_stores_other_zero_points_than_its_config_says(tiny, tmp_path):
    out = quantized(tiny(), tmp_path / "out", "quant.int4_rtn", "steps[0].with.group_size=32", "export.format=gptq")
    assert validate(out)["ok"]
    change(out, **{f"{UP}.qzeros": torch.zeros_like})
    says(out, UP, "two readers")


def test_scales_of_the_gptq_layout_may_be_negative_but_not_zero(tiny, tmp_path):
    out = quantized(tiny(), tmp_path / "out", "quant.int4_rtn", "steps[0].with.group_size=32", "export.format=gptq")
    change(out, **{f"{UP}.scales": torch.neg})
    assert validate(out)["ok"]
    change(out, **{f"{UP}.scales": torch.zeros_like})
    says(out, UP, "zero")


def test_missing_and_broken_scales(tiny, tmp_path):
    out = quantized(tiny(), tmp_path / "out", "quant.fp8_static", *CALIBRATION)
    assert validate(out)["ok"]
    change(out, **{f"{UP}.input_scale": None})
    says(out, UP, "has no input_scale")
    change(out, **{f"{UP}.input_scale": torch.tensor([float("nan")])})
    says(out, UP, "NaN")
    change(out, **{f"{UP}.input_scale": torch.tensor([-1.0])})
    says(out, UP, "not positive")
    change(out, **{f"{UP}.weight_scale": None, f"{UP}.input_scale": None})
    assert not validate(out)["ok"]


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale"])
def test_fused_linears_share_their_scales(tiny, tmp_path, suffix):
    out = quantized(tiny(), tmp_path / "out", "quant.fp8_static", *CALIBRATION)
    change(out, **{f"{UP}.{suffix}": lambda t: t * 2})
    says(out, UP, suffix, "gate_proj")


def test_which_scales_are_shared():
    assert shared_scales({"weight_global_scale": torch.ones(1), "weight_scale": torch.ones(4, 2), "input_global_scale": torch.ones(())}) == {
        "weight_global_scale": 1.0, "input_global_scale": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
def test_the_ignore_list_both_ways(tiny, tmp_path, to):
    overrides = ("steps[0].with.group_size=32", f"export.format={to}", "steps[0].ignore=[down]")
    out = quantized(tiny(), tmp_path / "out", "quant.int4_rtn", *overrides)
    found = validate(out)
    assert found["ok"] and {r["name"] for r in found["unquantized"]} == {"lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    key = {"compressed-tensors": "ignore", "gptq": "dynamic", "awq": "modules_to_not_convert"}[to]
    rule = {"gptq": "-:.*up_proj", "awq": "up_proj"}.get(to, "re:.*up_proj")
    configure(out, **{key: {**config[key], rule: {}} if to == "gptq" else [*config[key], rule]})
    says(out, UP, "stored quantized", "ignored")
    configure(out, **{key: {} if to == "gptq" else ["lm_head"]})
    if to == "compressed-tensors":
        says(out, "down_proj", "stayed unquantized")
    else:  # these layouts do not say which kinds of linear they mean
        assert [r["ignored"] for r in validate(out)["unquantized"] if "down" in r["name"]] == [False, False]


def test_one_of_a_kind_that_stayed_must_be_ignored(tiny, tmp_path):
    out = quantized(tiny(), tmp_path / "out", "quant.fp8_block", "steps[0].with.block_size=32", "steps[0].ignore=['re:.*layers.0.*down_proj']")
    assert validate(out)["ok"]
    configure(out, modules_to_not_convert=["lm_head"])
    says(out, "layers.0.mlp.down_proj", "stayed unquantized")


def test_kv_cache_scales(tiny, tmp_path):
    out = quantized(tiny(), tmp_path / "out", "quant.int8_dynamic")
    scales = {f"model.layers.{i}.self_attn.{kind}_scale": torch.ones(1) for i in (0, 1) for kind in "kv"}
    change(out, **scales)
    says(out, "k_scale", "no kv_cache_scheme")
    configure(out, kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True})
    assert validate(out)["problems"] == []
    change(out, **{"model.layers.1.self_attn.v_scale": torch.zeros(1)})
    says(out, "v_scale", "not positive")
    change(out, **{"model.layers.1.self_attn.v_scale": None})
    says(out, "layers.1.self_attn.v_scale", "missing")
    configure(out, kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False, "symmetric": True})
    says(out, "k_scale", "needs 2")
    change(out, **{name: torch.ones(2) for name in scales})
    assert validate(out)["ok"]


def test_verdicts_go_by_the_folder_not_by_its_records(tiny, tmp_path):
    out = quantized(tiny(), tmp_path / "out", "quant.int4_rtn", "steps[0].with.group_size=32", "steps[0].with.symmetric=false")
    records = json.loads((out / "angelslim/plan.json").read_text())["engines"]
    for file in out.glob("angelslim/*"):
        file.unlink()
    found = validate(out)["engines"]
    assert {name: v["ok"] for name, v in found.items()} == {name: v["ok"] for name, v in records.items()}
    assert found["vllm"]["ok"] and not found["transformers"]["ok"]
    assert validate(tiny())["engines"]["vllm"] == {"ok": True, "why": "weights stay in a plain floating-point layout"}
