"""Every calibrated pass on models with an expert that the router never picks."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core import compress
from angelslim_core.testing.models import stack_experts

LOST = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def model(request, tiny_copy):
    """A model of one layer with experts whose last expert is picked for no token."""
    if request.param == "deepseek_v3":
        folder = tiny_copy("deepseek_v3", n_routed_experts=5, n_group=1, first_k_dense_replace=0, num_hidden_layers=1)
    else:
        folder = tiny_copy("qwen3_moe", num_experts=5, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    if request.param == "deepseek_v3":
        tensors["model.layers.0.mlp.gate.e_score_correction_bias"][LOST] = -10
    else:  # whatever the sign of u x, two experts lie above the last one's 0
        u = tensors["model.layers.0.mlp.gate.weight"][0].clone()
        tensors["model.layers.0.mlp.gate.weight"] = torch.stack([u, 2 * u, -u, -2 * u, 0 * u])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(model, out, text, *steps):
    steps = [{"use": use, "with": options} for use, options in steps]
    result = compress(model, out=out, recipe={"steps": steps, "calibration": {"data": str(text), "samples": 4, "tokens": 32, "batch_size": 2}})
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        assert not tensor.is_floating_point() or torch.isfinite(tensor.float()).all(), name
        assert "scale" not in name or (tensor.float() > 0).all(), name
    router = "model.layers.0.mlp.gate.weight"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert tensors[router].dtype == load_file(model / "model.safetensors")[router].dtype and router.removesuffix(".weight") in config["ignore"]
    experts = json.loads((out / "angelslim/analysis.json").read_text())["experts"]["0"]
    assert experts[LOST] == 0 and min(experts[:LOST]) > 0 and sum(experts) == 2 * 4 * 32
    return result, tensors


STATIC = [("quant.fp8_static", {}), ("quant.lepto", {}), ("quant.fp8_static", {"observer": "histogram"}), ("quant.nvfp4", {}), ("quant.nvfp4", {"gptq": False})]


@pytest.mark.parametrize(("use", "options"), STATIC, ids=str)
def test_an_unhit_expert_takes_the_largest_input_scale_of_its_siblings(model, tmp_path, text, use, options):
    scale = "input_global_scale" if use == "quant.nvfp4" else "input_scale"
    result, tensors = run(model, tmp_path / "routed", text, (use, {**options, "calibrate_all_experts": False}))
    for role in ("gate", "up", "down"):
        scales = [float(tensors[f"model.layers.0.mlp.experts.{e}.{role}_proj.{scale}"]) for e in range(5)]
        largest = max if scale == "input_scale" else min  # global scales are stored inverted
        assert scales[LOST] == largest(scales[:LOST]), role
    lent = [f for f in result.fallbacks if "its input scale is the largest of its siblings'" in f]
    assert len(lent) == 2 and all(f"experts.{LOST}." in f for f in lent)
    assert result.passes[0]["metrics"]["input_scales_of_siblings"] == 2
    everything, _ = run(model, tmp_path / "all", text, (use, {**options, "calibrate_all_experts": True}))
    assert everything.fallbacks == [] and everything.passes[0]["metrics"]["input_scales_of_siblings"] == 0


@pytest.mark.parametrize("use", ["quant.gptq", "quant.w4a8_fp8", "quant.w4a8_int8", "quant.nvfp4"])
def test_an_unhit_expert_is_rounded_to_nearest(model, tmp_path, text, use):
    options = {} if use == "quant.nvfp4" else {"group_size": 16}
    result, _ = run(model, tmp_path / "routed", text, (use, {**options, "calibrate_all_experts": False}))
    nearest = [f for f in result.fallbacks if "rounded to nearest" in f]
    assert len(nearest) == 2 and all(f"experts.{LOST}." in f for f in nearest)
    assert result.passes[0]["metrics"]["experts_rounded_to_nearest"] == 2
    assert run(model, tmp_path / "all", text, (use, options))[0].fallbacks == []


@pytest.mark.parametrize(
    "steps",
    [
        [("quant.gptaq", {"group_size": 16})],
        [("quant.awq", {"group_size": 16, "grid": 3})],
        [("quant.smooth", {}), ("quant.fp8_static", {})],
        [("quant.smooth", {}), ("quant.fp8_static", {"calibrate_all_experts": False})],
        [("quant.learned_rounding", {"group_size": 16, "iterations": 2})],
        [("quant.learned_rounding", {"group_size": 16, "iterations": 2, "start": "nearest"})],
    ],
    ids=lambda steps: "+".join(use for use, _ in steps),
)
def test_other_passes_calibrate_every_expert(model, tmp_path, text, steps):
    result, _ = run(model, tmp_path / "o", text, *steps)
    expected = 2 if steps[-1][1].get("calibrate_all_experts") is False else 0
    assert len(result.fallbacks) == expected


def test_a_few_tokens_do_not_ruin_an_expert(tiny, tmp_path, text):
    def worst(tokens):
        step = {"use": "quant.nvfp4", "with": {"calibrate_all_experts": False}, "targets": ["experts"]}
        recipe = {"steps": [step], "calibration": {"data": str(text), "samples": 1, "tokens": tokens}}
        return compress(tiny("qwen3_moe"), out=tmp_path / str(tokens), recipe=recipe).passes[0]["metrics"]["sqnr_db_min"]

    assert worst(3) > 13  # inputs that round to 0 in all of them are not dead


def test_fused_experts_are_treated_as_separate_ones(tiny_copy, tmp_path, text):
    folder = tiny_copy("qwen3_moe", num_hidden_layers=1)
    recipe = {
        "steps": [{"use": "quant.fp8_static", "with": {"calibrate_all_experts": False}}],
        "calibration": {"data": str(text), "samples": 2, "tokens": 16},
        "gates": {"min_expert_tokens": 1},
    }
    compress(folder, out=tmp_path / "separate", recipe=recipe)
    stack_experts(folder)
    compress(folder, out=tmp_path / "fused", recipe=recipe)
    separate, fused = (load_file(tmp_path / name / "model.safetensors") for name in ("separate", "fused"))
    assert separate.keys() == fused.keys() and all(torch.equal(separate[n].float(), fused[n].float()) for n in separate)
    analyses = [(tmp_path / name / "angelslim/analysis.json").read_bytes() for name in ("separate", "fused")]
    assert json.loads(analyses[0]) == json.loads(analyses[1])
