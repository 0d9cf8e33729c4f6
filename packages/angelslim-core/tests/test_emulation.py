"""Inputs rounded as engines do: hand-made values for every grid, and models whose linears do it."""

import pytest
import torch

from angelslim_core import compress, evaluate
from angelslim_core.emulation import check_emulable, round_input
from angelslim_core.errors import ModelError
from angelslim_core.exporters.modelopt import nvfp4_scheme
from angelslim_core.loading import OWN_READER, load_model
from angelslim_core.rounding import cast_e4m3, e2m1_codes, e8m0_codes, round_e2m1
from angelslim_core.schemes import Grid, code_values
from angelslim_core.unfuse import unfuse

IDS = torch.arange(2, 34)[None]


def test_all_16_e2m1_codes_and_ties():
    codes = torch.arange(16, dtype=torch.uint8)
    values = code_values(codes)
    assert round_e2m1(values).equal(values)
    assert e2m1_codes(values).tolist() == [*range(8), 0, *range(9, 16)]  # zero has no sign
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4] and round_e2m1(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    assert round_e2m1(torch.tensor([0.2501, 0.7499, 5.01, 1e4, -1e4])).tolist() == [0.5, 0.5, 6, 6, -6]
    assert cast_e4m3(torch.tensor([1e4])).float() == 448


def test_powers_of_two():
    amax = torch.tensor([0.0, 6.0, 6.1, 7.0, 8.0, 11.9, 3.0, 1e-45, 3e38])
    exponent = lambda rounding: [c - 127 for c in e8m0_codes(amax, 6.0, rounding).tolist()]  # noqa: E731
    assert exponent("up")[:7] == [0, 0, 1, 1, 1, 1, -1]
    assert exponent("down")[:7] == [0, 0, 0, 0, 1, 1, -1]
    assert exponent("even")[:7] == [0, 0, 0, 1, 1, 1, -1]
    assert exponent("up")[7:] == [-126, 126]
    assert [c - 127 for c in e8m0_codes(torch.tensor([448.0, 449.0, 512.0]), 448.0, "up").tolist()] == [0, 1, 1]


@pytest.mark.parametrize(
    ("grid", "scale", "given", "wanted"),
    [
        (Grid(8, "int", "token", dynamic=True), None, [[127, 0.4, -3.6, 0], [0, 0, 0, 0]], [[127, 0, -4, 0], [0, 0, 0, 0]]),
        (Grid(8, "float", "token", dynamic=True), None, [[448, 17, 19, -449 / 448]], [[448, 16, 20, -1]]),
        (Grid(8, "float", "tensor"), 2.0, [[2000, 34, 38, 0]], [[896, 32, 40, 0]]),
        (Grid(8, "float", "group", 2, dynamic=True), None, [[448, 17, 4.48, 0.17, 1]], [[448, 16, 4.48, 0.16, 1]]),
        (Grid(4, "float", "group", 2, dynamic=True, scale_dtype="U8"), None, [[8, 3, 7, 2.6]], [[8, 3, 8, 3]]),
        (Grid(8, "float", "group", 2, dynamic=True, scale_dtype="U8"), None, [[447, 17, 0, 0]], [[448, 16, 0, 0]]),
        (Grid(4, "float", "tensor_group", 2, dynamic="local", scale_dtype="F8_E4M3"), 0.5, [[6, 5.1, 12, 1.1]], [[6, 6, 12, 1]]),
        (Grid(4, "float", "tensor_group", 2, dynamic="local", scale_dtype="F8_E4M3"), 2.0**-12, [[6, 1, 2, 0]], [[0.65625, 0.65625, 0.65625, 0]]),
    ],
)
def test_hand_made_inputs(grid, scale, given, wanted):
    found = round_input(torch.tensor(given, dtype=torch.float32), grid, None if scale is None else torch.tensor([scale]))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32), rtol=1e-6, atol=1e-6)
    assert round_input(torch.tensor(given).bfloat16()[None], grid, None if scale is None else torch.tensor([scale])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("grid", "scale"),
    [
        (Grid(8, "int", "token", symmetric=False, dynamic=True), None),
        (Grid(6, "float", "token", dynamic=True), None),
        (Grid(8, "float", "tensor"), None),
        (nvfp4_scheme(True).input_activations, None),
        (Grid(8, "float", "channel"), None),
    ],
)
def test_what_cannot_be_emulated_is_refused(grid, scale):
    with pytest.raises(ModelError):
        check_emulable("m", grid, scale)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_experts_round_their_inputs(tiny, tmp_path, architecture):
    """transformers holds experts as 3-D parameters, so that our reader takes them apart."""
    compress(tiny(architecture, dtype="float32"), ["quant.int8_dynamic"], tmp_path / "out")
    loaded, plain = load_model(tmp_path / "out", "cpu"), load_model(tmp_path / "out", "cpu", emulate=False)
    assert loaded.backend == OWN_READER
    with torch.no_grad():
        rounded, exact = loaded.model(IDS).logits, plain.model(IDS).logits
        assert 1e-5 < float((rounded - exact).abs().max()) < 0.1 * float(exact.abs().max())
        hooked = [name for name, module in loaded.model.named_modules() if module._forward_pre_hooks]
        assert any("experts.3.down_proj" in name for name in hooked) and len(hooked) == len({*hooked})
        for layer in plain.model.model.layers:
            unfuse(layer, keep=True)
        torch.testing.assert_close(plain.model(IDS).logits, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_experts_that_stay_beside_quantized_linears_are_read(tiny, tmp_path, architecture):
    """As a trained pass leaves them; transformers finds no separate experts in a folder with a quantization_config."""
    step = {"use": "quant.int4_rtn", "with": {"group_size": 16}, "ignore": ["experts"]}
    result = compress(tiny(architecture, dtype="float32"), recipe={"steps": [step]}, out=tmp_path / "out")
    assert not result.plan["engines"]["transformers"]["ok"]
    loaded = load_model(tmp_path / "out", "cpu", packed=False)
    exact = load_model(tiny(architecture, dtype="float32"), "cpu")
    assert loaded.backend == OWN_READER
    with torch.no_grad():
        found, wanted = loaded.model(IDS).logits, exact.model(IDS).logits
    assert 0 < float((found - wanted).abs().max()) < float(wanted.abs().max())
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(loaded.model.get_parameter(name), exact.model.get_parameter(name))


def test_evaluation_counts_the_rounding(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    model = tiny("llama", dtype="float32")
    compress(model, ["quant.mxfp4"], tmp_path / "full")
    compress(model, ["quant.mxfp4"], tmp_path / "weights", overrides=["steps[0].with.weight_only=true"])
    full, weights = (evaluate(tmp_path / name, model, text=text, windows=1, length=32) for name in ("full", "weights"))
    assert full["backend"] == weights["backend"] == OWN_READER and full["kl"] > weights["kl"] > 0
