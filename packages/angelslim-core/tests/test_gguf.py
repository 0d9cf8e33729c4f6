"""GGUF files: blocks against the gguf library's dequantizer, tensors and hyperparameters against transformers' reader."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim_core import compress
from angelslim_core.conversion import convert
from angelslim_core.errors import ModelError, OutputError, PlanError, UsageError
from angelslim_core.gguf import write
from angelslim_core.gguf.blocks import FEW, choose, decode, holding, lay_out, ternary
from angelslim_core.gguf.model import Shape
from angelslim_core.gguf.tokenizer import _LLAMA3, _QWEN2, CONTROL, NORMAL, UNUSED, read_vocabulary
from angelslim_core.schemes import Grid, Quantized, Scheme
from angelslim_core.source import open_any

gguf = pytest.importorskip("gguf")


def read(path):
    """(fields, tensors in fp32)."""
    found = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).float().reshape(*map(int, t.shape[::-1])) for t in found.tensors}
    return {name: field.contents() for name, field in found.fields.items()}, tensors, {t.name: t.tensor_type.name for t in found.tensors}


def test_hand_made_q4_0_block():
    codes = torch.tensor([[*range(-8, 8), *range(7, -9, -1)]], dtype=torch.int8)
    quantized = Quantized(Scheme("t", Grid(4, "int", "group", 32)), codes, torch.tensor([[1.0]]))
    found = lay_out(quantized, "Q4_0")[0].tolist()
    assert found[:2] == [0x00, 0x3C]  # 1 in F16
    assert found[2:] == [low | (15 - low) << 4 for low in range(16)]  # element i low, element i + 16 high


@pytest.mark.parametrize(
    "grid", [Grid(4, "int", "group", 32), Grid(4, "int", "group", 64), Grid(3, "int", "channel"), Grid(8, "int", "channel"), Grid(8, "int", "tensor")]
)
def test_codes_keep_their_weights(grid):
    generator = torch.Generator().manual_seed(0)
    half = 1 << (grid.bits - 1)
    codes = torch.randint(-half, half, (6, 128), generator=generator, dtype=torch.int8)
    scale = torch.rand(grid.scale_shape((6, 128)), generator=generator).add(0.01).bfloat16()
    quantized = Quantized(Scheme("t", grid), codes, scale)
    kinds = holding(grid, 128)
    assert [k for k in kinds if k not in FEW] == (["Q4_0", "Q8_0"] if grid.bits <= 4 else ["Q8_0"])
    assert choose(quantized, kinds) == ("Q4_0" if grid.bits <= 4 else "Q8_0")
    for kind in ("Q4_0", "Q8_0") if grid.bits <= 4 else ("Q8_0",):
        assert decode(lay_out(quantized, kind).numpy(), kind).equal(quantized.dequantize())
    quantized.scale = scale.float() * (1 + 2**-20)
    assert lay_out(quantized, "Q8_0") is None and choose(quantized, kinds) is None


def test_grids_that_no_block_holds():
    assert not holding(Grid(4, "int", "group", 32, symmetric=False), 128)
    assert not holding(Grid(4, "int", "group", 48), 96)
    assert not holding(Grid(4, "int", "channel"), 100)
    assert not holding(Grid(8, "float", "channel"), 128)


def test_ternary_blocks():
    weight = torch.randint(-1, 2, (4, 512)).float() * 0.25
    found = ternary(weight.bfloat16(), 256)
    assert found is not None and found.dequantize().equal(weight)
    weight[:, :64] *= 2  # of its own scale: for blocks of 64 only
    assert ternary(weight, 256) is None and ternary(weight, 64) is not None
    assert not ternary(weight + torch.eye(4, 512) * 0.1, 64) and not ternary(weight[:, :300], 64) and not ternary(torch.zeros(4, 512), 64)


@pytest.mark.parametrize(
    ("architecture", "options"), [("llama", {}), ("llama", {"tie_word_embeddings": True, "attention_bias": True}), ("qwen2", {}), ("qwen3", {"head_dim": 128})]
)
def test_transformers_reads_the_same_model(tiny, tmp_path, architecture, options):
    """Names, row order, biases, tied heads and hyperparameters: its reader undoes what llama.cpp's layout asks for."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # norms are F32 in the file, the rest BF16, so the model in fp32 is the same
    folder = tiny(architecture, **options)
    found = convert(folder, tmp_path / "m.gguf", "gguf", "bf16")
    assert found["rounded"] == 0 and not [p for p in tmp_path.iterdir() if p.name != "m.gguf"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(ids).logits).abs().max()
    if options.get("attention_bias"):  # their Llama reader drops biases; compare the tensors
        _, tensors, _ = read(tmp_path / "m.gguf")
        bias = open_any(folder).read("model.layers.0.self_attn.q_proj.bias").float()
        assert tensors["blk.0.attn_q.bias"].reshape(4, 8, 2).transpose(1, 2).reshape(-1).equal(bias) and "output.weight" not in tensors
    else:
        assert difference < 1e-4


def test_codes_of_a_folder(tiny, tmp_path):
    folder = compress(tiny(), ["quant.int4_rtn"], tmp_path / "ct", overrides=["steps[0].with.group_size=32"]).path
    found = convert(folder, tmp_path / "m.gguf", "gguf")
    assert found["tensors"]["Q4_0"] == 14 and found["rounded"] == 0
    fields, tensors, kinds = read(tmp_path / "m.gguf")
    source = open_any(folder)
    assert tensors["blk.1.ffn_down.weight"].equal(source.read_quantized("model.layers.1.mlp.down_proj").dequantize())
    k = source.read_quantized("model.layers.1.self_attn.k_proj").dequantize()
    assert tensors["blk.1.attn_k.weight"].reshape(2, 8, 2, -1).transpose(1, 2).reshape(k.shape).equal(k) and kinds["blk.1.attn_k.weight"] == "Q4_0"
    assert fields["general.file_type"] == 2 and fields["llama.attention.head_count_kv"] == 2
    with pytest.raises(OutputError):
        convert(folder, tmp_path / "m.gguf", "gguf")
    for kind, why in (("q4_1", "does not hold"), ("tq2_0", "ternary"), ("q2_0", "codes -2 to 1"), ("stq1_0", "lie 16 apart")):
        with pytest.raises(PlanError, match=why):
            convert(folder, tmp_path / "n.gguf", "gguf", kind)
    with pytest.raises(UsageError):
        convert(folder, tmp_path / "folder", "gguf")
    int8 = compress(tiny(), ["quant.int8_dynamic"], tmp_path / "int8").path
    assert convert(int8, tmp_path / "8.gguf", "gguf")["tensors"]["Q8_0"] == 14
    asym = compress(tiny(), ["quant.int4_rtn"], tmp_path / "a", overrides=["steps[0].with.group_size=32", "steps[0].with.symmetric=false"]).path
    assert convert(asym, tmp_path / "a.gguf", "gguf")["rounded"] > 0  # no block has such a zero point: F16, and it says so


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_plain_models_are_rounded_and_it_says_so(tiny, tmp_path, kind):
    found = convert(tiny(), tmp_path / "m.gguf", "gguf", kind)
    _, tensors, kinds = read(tmp_path / "m.gguf")
    assert kinds["blk.0.ffn_up.weight"] == kind.upper() and kinds["token_embd.weight"] == "Q8_0" and found["rounded"] == 16
    weight = open_any(tiny()).read("model.layers.0.mlp.up_proj.weight").float()
    assert (tensors["blk.0.ffn_up.weight"] - weight).abs().max() < weight.abs().max() / (100 if kind == "q8_0" else 7)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_ternary_models(tiny_copy, tmp_path, kind):
    folder = tiny_copy(hidden_size=64, intermediate_size=256)
    with pytest.raises(PlanError, match="ternary"):
        convert(folder, tmp_path / "m.gguf", "gguf", kind)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = (torch.randint(-1, 2, tensors[name].shape, generator=torch.Generator().manual_seed(0)) * 0.03125).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    found = convert(folder, tmp_path / "m.gguf", "gguf", kind)
    _, stored, kinds = read(tmp_path / "m.gguf")
    assert found["tensors"][kind.upper()] == 1 and found["rounded"] == 0
    assert stored["blk.0.ffn_down.weight"].equal(tensors[name].float()) and kinds["blk.1.ffn_down.weight"] == "BF16"


def test_a_failure_leaves_nothing(tiny, tmp_path, monkeypatch):
    def fail(source, entry):
        raise ModelError(1, "x", "y")

    monkeypatch.setattr(write, "_data", fail)
    with pytest.raises(ModelError):
        convert(tiny(), tmp_path / "m.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_llama3_rotary_divisors():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = {"num_attention_heads": 8, "hidden_size": 1024, "head_dim": 128, "rope_parameters": rope}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**{**config, "max_position_embeddings": 131072}), device="cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    assert torch.allclose(plain / torch.tensor(Shape(config, "llama").rope_divisors()), scaled, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": True, "sliding_window": 64},
        {"rope_parameters": {"rope_type": "longrope"}},
    ],
)
def test_architectures_it_does_not_know(change, tiny, tmp_path):
    with pytest.raises(PlanError):
        Shape({"num_attention_heads": 4, "hidden_size": 64, **change}, "llama")
    with pytest.raises(PlanError, match=r"llama\.cpp"):
        convert(tiny("gemma3_text"), tmp_path / "m.gguf", "gguf")


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": -1}, {"hidden_size": "64"}, {"head_dim": True}, {"rms_norm_eps": None}, {"max_position_embeddings": 1 << 40}]
)
def test_hostile_hyperparameters(tiny, change):
    config = {**json.loads((tiny() / "config.json").read_text()), **change}
    with pytest.raises(ModelError):
        Shape(config, "llama").fields()


def tokenizer(folder, steps=None, **model):
    """A folder with a small tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": steps is None or "gpt2" in steps}
    parts = [{"type": "Digits", "individual_digits": True}] if steps and "digits" in steps else []
    parts += [{"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in steps or () if s not in ("gpt2", "digits")]
    data = {
        "added_tokens": [{"id": 4, "content": "<s>", "special": True}, {"id": 5, "content": "<tool>", "special": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*parts, byte_level]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": [["a", "b"]], **model},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "T"}]}))
    return folder


def test_vocabulary(tmp_path):
    found = read_vocabulary(tokenizer(tmp_path), {"eos_token_id": [4, 5]}, 8)
    assert found.tokens == ["a", "b", "ab", "c", "<s>", "<tool>", "[PAD6]", "[PAD7]"]
    assert found.types == [NORMAL] * 4 + [CONTROL, 4, UNUSED, UNUSED]
    assert found.merges == ["a b"] and found.specials == {"bos": 4, "eos": 4} and found.add_bos and found.template == "T"


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        (("gpt2",), False, "gpt-2"),
        (("digits", "gpt2"), False, "smollm"),
        ((_LLAMA3,), True, "llama-bpe"),
        ((_LLAMA3,), False, "smaug-bpe"),
        ((_QWEN2,), False, "qwen2"),
    ],
)
def test_splitters(tmp_path, steps, ignore_merges, name):
    assert read_vocabulary(tokenizer(tmp_path, steps, ignore_merges=ignore_merges), {}, 8).splitter == name


def test_the_qwen_pattern_is_the_library_s():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PRETOKENIZE_REGEX == _QWEN2


def test_tokenizers_it_does_not_know(tmp_path, tiny):
    for model in ({"type": "Unigram"}, {"byte_fallback": True}, {"ignore_merges": True}):
        with pytest.raises(PlanError):
            read_vocabulary(tokenizer(tmp_path, **model), {}, 8)
    with pytest.raises(PlanError, match="splits text"):
        read_vocabulary(tokenizer(tmp_path, (r"\p{Han}+",)), {}, 8)
    with pytest.raises(ModelError, match="ids up to"):
        read_vocabulary(tokenizer(tmp_path), {}, 5)
    for vocab in ({"a": "x"}, [], None):
        with pytest.raises(ModelError):
            read_vocabulary(tokenizer(tmp_path, vocab=vocab), {}, 8)
    with pytest.raises(ModelError, match="has no tokenizer"):
        convert(tiny(tokenizer=False), tmp_path / "m.gguf", "gguf")


def test_runtime_policies_are_named(tiny, tmp_path):
    folder = shutil.copytree(tiny(), tmp_path / "in")
    (folder / "angelslim").mkdir()
    (folder / "angelslim" / "runtime.json").write_text('{"policies": [{"pass": "sparseattn.stem", "policy": {}}]}')
    assert "runtime policies" in convert(folder, tmp_path / "m.gguf", "gguf")["warnings"][0]
