"""Multimodal checkpoints: the language model is quantized, what lies beside it stays, and every reader finds its tensors."""

import pytest
import torch
import transformers

from angelslim_core import compress, load
from angelslim_core.loading import load_model
from angelslim_core.source import open_any, open_source
from angelslim_core.testing.models import NESTED
from angelslim_core.validation import validate

TOWERS = ("vision_tower", "audio_tower", "visual", "multi_modal_projector")
LAYERS = ("model.language_model", "language_model.model", "model")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return str(file)


def steps_that_share_a_folder():
    return [{"use": "quant.int8_dynamic", "targets": ["attention"]}, {"use": "quant.fp8_static", "targets": ["layers[1:].mlp"]}]


@pytest.mark.parametrize("architecture", NESTED)
@pytest.mark.parametrize("steps", [[{"use": "quant.int8_dynamic"}], [{"use": "quant.fp8_static"}]], ids=["int8", "fp8"])
def test_language_layers_only(tiny, tmp_path, text, architecture, steps):
    model, out = tiny(architecture), tmp_path / "out"
    compress(model, out=out, recipe={"steps": steps, "calibration": {"data": text, "samples": 2, "tokens": 16}})
    found = validate(out, model)
    assert found["ok"], found["problems"]
    before, after = open_source(model), open_any(out)
    assert after.dtypes.keys() == before.dtypes.keys()
    kept = [n for n in before.dtypes if n.removesuffix(".weight") not in after.quantized]
    assert all(after.read(n).equal(before.read(n)) for n in kept)
    beside = [n for n in before.dtypes if any(tower in n.split(".")[:2] for tower in TOWERS)]
    assert len(beside) > 15 and set(beside) <= set(kept)
    layers = [n for n in before.dtypes if n.endswith(("down_proj.weight", "o_proj.weight")) and n.split(".layers.")[0] in LAYERS]
    assert layers and not set(layers) & set(kept)
    assert_same_function(load(out, "cpu")[0], load(model, "cpu")[0])


@pytest.mark.parametrize("architecture", ["gemma3", "llava", "qwen2_5_vl", "qwen2_audio"])
def test_transformers_alone_reads_what_names_its_modules(tiny, tmp_path, text, architecture):
    out = tmp_path / "out"
    compress(tiny(architecture), out=out, recipe={"steps": steps_that_share_a_folder(), "calibration": {"data": text, "samples": 2, "tokens": 16}})
    loaded = load_model(out, "cpu", packed=False)
    assert loaded.backend == "transformers"
    packed = load_model(out, "cpu", packed=True)
    assert "3 linears packed (FP8 on torch) and 8 linears packed (INT8" in packed.backend
    assert_same_function(packed.model, load(tiny(architecture), "cpu")[0])
    auto = transformers.AutoModelForSeq2SeqLM if "audio" in architecture else transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_function(model, load(tiny(architecture), "cpu")[0])


def test_block_fp8_leaves_the_tower_to_transformers(tiny, tmp_path):
    from transformers.quantizers.quantizers_utils import should_convert_module

    out = tmp_path / "out"
    compress(tiny("gemma3"), out=out, recipe={"steps": [{"use": "quant.fp8_block", "with": {"block_size": 32}}]})
    kept = open_any(out).config["quantization_config"]["modules_to_not_convert"]
    names = [n for n, m in load(out, "cpu")[0].named_modules() if isinstance(m, torch.nn.Linear) and should_convert_module(n, kept)]
    assert names and all(n.startswith("model.language_model.layers.") for n in names)
    # releases differ in what stands between the tower's name and its layers
    assert not should_convert_module("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1", kept)


def assert_same_function(one, other):
    """Nearly the same logits: nothing was left at its random start."""
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        got, wanted = (m(ids).logits.float().log_softmax(-1) for m in (one, other))
    assert float((wanted.exp() * (wanted - got)).sum(-1).mean()) < 1e-2
