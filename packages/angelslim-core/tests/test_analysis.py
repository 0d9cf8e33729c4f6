"""Numbers for the report against their definitions, and what a run records of them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core import compress, schemes
from angelslim_core.analysis import half_octaves, merged, weight_numbers
from angelslim_core.errors import NumericError, PlanError
from angelslim_core.exporters.compressed_tensors import CompressedTensors
from angelslim_core.rounding import e2m1_codes
from angelslim_core.schemes import E2M1, Grid, Quantized, Scheme, code_values


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


def calibrated(text, *steps, **more):
    steps = [{"use": s} if isinstance(s, str) else s for s in steps]
    return {"steps": steps, "calibration": {"data": str(text), "samples": 4, "tokens": 24, **more}}


def analysis_of(folder):
    return json.loads((folder / "angelslim/analysis.json").read_text())


def test_numbers_of_a_weight():
    torch.manual_seed(0)
    weight = torch.randn(8, 64).bfloat16()
    weight[3, 5] = -30
    scheme = Scheme("int4 g32", Grid(4, "int", "group", 32, scale_dtype="BF16"))
    scale = torch.full((8, 2), 0.5, dtype=torch.bfloat16)
    scale[0, 0], scale[7, 1] = 0.25, 4
    result = Quantized(scheme, torch.randint(-8, 8, (8, 64), dtype=torch.int8), scale)
    numbers = weight_numbers(weight, result, CompressedTensors().pack(result))
    exact = weight.double()
    error = (exact - result.dequantize().double()).square().sum()
    assert numbers["sqnr_db"] == pytest.approx(10 * math.log10(exact.square().sum() / error), abs=1e-3)
    assert numbers["amax"] == 30 and numbers["rms"] == pytest.approx(float(exact.square().mean().sqrt()), rel=1e-3)
    assert numbers["scale"] == [0.25, 0.5, 4] and "input_scale" not in numbers
    assert numbers["bits"] == pytest.approx(4 + 16 / 32 + 2 * 64 / weight.numel(), rel=1e-3)  # codes, scales, the stored shape
    counts = {}
    for value in weight.float().abs().flatten().tolist():
        octave = math.floor(math.log2(value)) if value else -127
        number = 2 * octave + (value >= 1.5 * 2.0**octave)
        counts[number] = counts.get(number, 0) + 1
    top = max(counts)
    low = max(min(counts), top - 40)
    found = numbers["histogram"]
    assert found["first"] == low and sum(found["counts"]) == weight.numel()
    assert found["counts"][1:] == [counts.get(low + i, 0) for i in range(1, top - low + 1)]


def test_histograms_add_up_in_any_order():
    x = torch.randn(1000) * torch.logspace(-4, 4, 1000)
    assert torch.equal(half_octaves(x), half_octaves(x[:300]) + half_octaves(x[300:]))
    a, b = {"first": -3, "counts": [1, 2, 3]}, {"first": 1, "counts": [5]}
    assert merged(a, b) == merged(b, a) == {"first": -3, "counts": [1, 2, 3, 0, 5]}


def test_a_data_free_run_records_weights_only(tiny, tmp_path):
    compress(tiny(), ["quant.int8_dynamic"], tmp_path / "o", overrides=["steps[0].ignore=[o]"])
    found = analysis_of(tmp_path / "o")
    assert found["inputs"] == {} and found["experts"] == {}
    up, o = found["linears"]["model.layers.1.mlp.up_proj"], found["linears"]["model.layers.1.self_attn.o_proj"]
    assert up["layer"] == 1 and up["role"] == "up" and 8 < up["bits"] < 8.5 and up["sqnr_db"] > 30
    assert o == {"layer": 1, "role": "o", "weights": 64 * 64, "bits": 16}
    assert len(found["linears"]) == 14 and set(found["histograms"]) == {"q", "k", "v", "gate", "up", "down"}
    assert sum(found["histograms"]["up"]["1"]["counts"]) == 128 * 64


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "deepseek_v3"])
def test_a_calibrated_run_records_inputs_without_padding(tiny_copy, tmp_path, text, architecture):
    folder = tiny_copy(architecture, num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][7] = 300
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "the quick brown fox jumps over it"[:length]}) + "\n" for length in (24, 9, 21, 14)))
    for name, size in (("one", 1), ("four", 4)):
        compress(folder, out=tmp_path / name, recipe=calibrated(rows, "quant.fp8_static", batch_size=size))
    one, four = analysis_of(tmp_path / "one"), analysis_of(tmp_path / "four")
    first = "q_a+kv_a" if architecture == "deepseek_v3" else "q+k+v"
    for found in (one, four):
        layer = found["inputs"]["1"]
        assert layer[first]["channels"][0][0] == 7 and layer[first]["channels"][0][1] > 50
        assert layer[first]["amax"] / layer[first]["median"] == pytest.approx(layer[first]["channels"][0][1], rel=0.01)
        linear = found["linears"]["model.layers.1.self_attn.o_proj"]
        assert linear["input_scale"] == pytest.approx(layer["o"]["amax"] / 448, rel=0.1)  # measured before and after the weights were rounded
    for role, seen in one["inputs"]["0"].items():
        assert four["inputs"]["0"][role]["amax"] == pytest.approx(seen["amax"], rel=0.1), role
        assert sum(four["inputs"]["0"][role]["histogram"]["counts"]) == sum(seen["histogram"]["counts"]), role
    if architecture == "llama":
        assert one["experts"] == {}
    else:
        tokens = 24 + 9 + 21 + 14
        assert [sum(counts) for counts in four["experts"].values()] == [2 * tokens] * len(one["experts"])
        assert one["experts"].keys() == four["experts"].keys() == ({"1"} if architecture == "deepseek_v3" else {"0", "1"})
        assert len(one["inputs"]["1"]["expert_down"]["channels"][0]) == 3


def test_a_resumed_run_records_the_same(tiny, tmp_path, text):
    from angelslim_core.errors import StoppedError

    recipe = calibrated(text, {"use": "quant.gptq", "with": {"group_size": 32, "calibrate_all_experts": False}})
    compress(tiny("qwen3_moe"), out=tmp_path / "whole", recipe=recipe)
    calls = iter([False, True])
    with pytest.raises(StoppedError):
        compress(tiny("qwen3_moe"), out=tmp_path / "o", recipe=recipe, stop_requested=lambda: next(calls))
    assert compress(tiny("qwen3_moe"), out=tmp_path / "o", recipe=recipe).resumed_layers == 1
    assert (tmp_path / "o/angelslim/analysis.json").read_bytes() == (tmp_path / "whole/angelslim/analysis.json").read_bytes()


def test_large_input_scales_are_a_warning(tiny_copy, tmp_path, text):
    folder = tiny_copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = 3000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = compress(folder, out=tmp_path / "o", recipe=calibrated(text, "quant.fp8_static"))
    (line,) = [w for w in result.warnings if "input scale above 1.5" in w]
    assert line.startswith("3 linears") and "layers.0.self_attn" in line
    assert compress(folder, out=tmp_path / "n", recipe=calibrated(text, "quant.nvfp4")).warnings == []


def test_the_gate_on_tokens_per_expert(tiny, tmp_path, text):
    recipe = calibrated(text, {"use": "quant.gptq", "with": {"group_size": 32}})
    compress(tiny("qwen3_moe"), out=tmp_path / "free", recipe=recipe)
    counts = analysis_of(tmp_path / "free")["experts"]
    least = min(min(c) for c in counts.values())
    assert sum(map(sum, counts.values())) == 2 * 2 * 4 * 24
    compress(tiny("qwen3_moe"), out=tmp_path / "met", recipe={**recipe, "gates": {"min_expert_tokens": max(least, 1)}}) if least else None
    with pytest.raises(NumericError, match="tokens to") as caught:
        compress(tiny("qwen3_moe"), out=tmp_path / "unmet", recipe={**recipe, "gates": {"min_expert_tokens": least + 1}})
    assert caught.value.exit_code == 8 and not [p for p in tmp_path.iterdir() if "unmet" in p.name]
    for model, step in (("llama", recipe["steps"][0]), ("qwen3_moe", {"use": "quant.int8_dynamic"})):
        with pytest.raises(PlanError):
            compress(tiny(model), out=tmp_path / "o", recipe={**recipe, "steps": [step], "gates": {"min_expert_tokens": 1}})


def test_code_values_are_those_of_the_formats():
    fp4 = torch.tensor([*E2M1, *(-v for v in E2M1)])
    codes = torch.arange(16, dtype=torch.uint8)
    assert code_values(codes).equal(fp4) and code_values(codes).signbit().equal(fp4.signbit())
    assert e2m1_codes(fp4).equal(codes.masked_fill(codes == 8, 0))  # zero has no sign
    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found, wanted = code_values(fp8), fp8.float()
    assert found.isnan().sum() == 2 and found.isnan().equal(wanted.isnan()) and found.nan_to_num().equal(wanted.nan_to_num())


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, "int", "group", 16, symmetric=False),
        Grid(8, "int", "channel"),
        Grid(8, "float", "tensor"),
        Grid(8, "float", "block", block_structure=(8, 24)),
        Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3"),
    ],
    ids=lambda g: g.strategy,
)
def test_numbers_do_not_depend_on_how_many_rows_are_looked_at_together(monkeypatch, grid):
    generator = torch.Generator().manual_seed(0)
    shape = (37, 64)
    codes = torch.randint(0, 8, shape, generator=generator).to(torch.int8)
    if grid.type == "float":
        codes = codes.float().to(torch.float8_e4m3fn) if grid.bits == 8 else codes.view(torch.uint8)
    scale = torch.rand(grid.scale_shape(shape), generator=generator) + 0.5
    zero = None if grid.symmetric else torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8)
    result = Quantized(Scheme("", grid), codes, scale.to(torch.float8_e4m3fn) if grid.strategy == "tensor_group" else scale, zero)
    weight = result.dequantize() + torch.randn(shape, generator=generator)
    whole = weight_numbers(weight, result, {"codes": codes})
    noise = (result.dequantize() - weight).square().sum().double()
    assert math.isclose(whole["sqnr_db"], 10 * math.log10(weight.square().sum().double() / noise), abs_tol=2e-3)
    for rows in (1, 10):
        monkeypatch.setattr(schemes, "PIECE", rows * 64)
        assert weight_numbers(weight, result, {"codes": codes}) == whole
