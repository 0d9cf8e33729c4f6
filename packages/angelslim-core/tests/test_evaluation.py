"""The metrics against a naive computation, and loading against transformers itself."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from angelslim_core import compress, evaluate, load
from angelslim_core.errors import ModelError, NumericError, UsageError
from angelslim_core.evaluation import compare, cut_windows
from angelslim_core.loading import OWN_READER, load_model
from angelslim_core.testing.models import stack_experts


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


def test_windows_are_consecutive_cuts_without_special_tokens(tiny):
    tokenizer = load(tiny())[1]
    ids = tokenizer("abcdefghij", add_special_tokens=False)["input_ids"]
    assert len(ids) == 10
    assert cut_windows(tokenizer, "abcdefghij", 2, 4, "t").tolist() == [ids[:4], ids[4:8]]
    assert cut_windows(tokenizer, "abcdefghij", 9, 5, "t").tolist() == [ids[:5], ids[5:]]
    with pytest.raises(UsageError, match="less than one window"):
        cut_windows(tokenizer, "abc", 1, 4, "t")


def test_metrics_are_the_definition(tiny, monkeypatch):
    base, other = (load(tiny("llama", seed=s, dtype="float32"))[0] for s in (0, 1))
    ids = torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("angelslim_core.evaluation.ROWS", 7)  # rows that do not divide
    found = compare(other, base, ids)
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (base, other))
    nll = -q.gather(-1, ids[:, 1:, None]).mean()
    assert found["tokens"] == 57
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_model_equals_itself(tiny, text):
    found = evaluate(tiny(), tiny(), text=text, windows=3, length=16)
    assert found["kl"] == 0 and found["top1_agreement"] == 1 and found["perplexity"] == found["base_perplexity"]
    assert found["backend"] == "transformers" and found["windows"] == 3


def test_bad_input(tiny, tmp_path, text):
    with pytest.raises(UsageError, match="cannot be read"):
        evaluate(tiny(), text=tmp_path / "none.txt")
    with pytest.raises(UsageError, match="tokenizer"):
        evaluate(tiny(tokenizer=False), text=text)
    model = load(tiny())[0]
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericError, match="not finite"):
        compare(model, None, torch.ones(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("use", ["quant.int8_dynamic", "quant.fp8_dynamic", "quant.int4_rtn"])
def test_transformers_reloads_with_no_key_left_over(tiny, tmp_path, use):
    options = ["steps[0].with.group_size=32"] if "int4" in use else []
    compress(tiny(), [use], tmp_path / "o", overrides=options)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = load_model(tmp_path / "o", packed=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert ours.backend == "transformers" and torch.equal(ours.model(ids).logits, model(ids).logits)
    ours.model.to("meta")  # every weight goes where the model goes
    assert all(t.is_meta for t in (*ours.model.parameters(), *ours.model.buffers()))


@pytest.mark.parametrize(
    ("architecture", "use", "options"),
    [
        ("llama", "quant.fp8_block", ["steps[0].with.block_size=24"]),
        ("llama", "quant.int4_rtn", ["steps[0].with.group_size=32", "steps[0].with.symmetric=false"]),
        ("qwen3_moe", "quant.int8_dynamic", []),
        ("deepseek_v3", "quant.fp8_dynamic", []),
    ],
)
def test_our_reader_serves_what_transformers_cannot(tiny, tmp_path, architecture, use, options):
    compress(tiny(architecture), [use], tmp_path / "o", overrides=options)
    loaded = load_model(tmp_path / "o", packed=False)
    assert loaded.backend == OWN_READER
    from angelslim_core.source import open_any

    source = open_any(tmp_path / "o")
    name = "model.layers.1.self_attn.o_proj"
    assert name in source.quantized
    assert torch.equal(loaded.model.get_submodule(name).weight, source.read(f"{name}.weight"))
    base = load_model(tiny(architecture)).model
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        error = (loaded.model(ids).logits - base(ids).logits).float().norm() / base(ids).logits.float().norm()
    assert 0 < error < 0.25


def test_stacked_experts_load(tiny, tiny_copy, tmp_path):
    folder = tiny_copy("qwen3_moe")
    stack_experts(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(load(folder)[0](ids).logits, load(tiny("qwen3_moe"))[0](ids).logits)


def test_a_missing_tensor_is_never_initialised_at_random(tiny_copy):
    from safetensors.torch import load_file, save_file

    folder = tiny_copy()
    found = load_file(folder / "model.safetensors")
    del found["model.norm.weight"]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_model(folder)


def test_hostile_config_reaches_nothing(tiny_copy, tmp_path):
    folder = tiny_copy()
    canary = tmp_path / "canary"
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config.update(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, _attn_implementation="owner/kernel", transformers_weights="../x")
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and not canary.exists()
