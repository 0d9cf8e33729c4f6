"""FP8 KV cache: scales against their definition, what is stored, and that loading rounds what attention reads."""

import json

import pytest
import torch

import angelslim_quant.plugin as plugin
from angelslim_core import compress
from angelslim_core.errors import ModelError, PlanError
from angelslim_core.kv_cache import round_heads, tap, tapped
from angelslim_core.loading import OWN_READER, load_model
from angelslim_core.source import open_any
from angelslim_core.testing.conformance import check_pass
from angelslim_core.validation import validate
from angelslim_quant.passes.kv_fp8 import MULTIPLIERS, search

IDS = torch.arange(3, 43)[None]
CACHE = "KV cache rounded to FP8 by AngelSlim"


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """made(architecture, *steps): a folder, its base and the reports of its steps, made once."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    folders = {}

    def make(architecture, *steps, dtype="float32"):
        key = json.dumps([architecture, steps, dtype])
        if key not in folders:
            out = tmp_path_factory.mktemp("made") / "out"
            calibration = {"data": str(text), "samples": 4, "tokens": 32, "batch_size": 2}
            result = compress(tiny(architecture, dtype=dtype), out=out, recipe={"steps": list(steps), "calibration": calibration})
            folders[key] = out, tiny(architecture, dtype=dtype), [p["metrics"] for p in result.passes], text
        return folders[key]

    return make


def kv(**options):
    return {"use": "quant.kv_fp8", "with": options}


def scales(folder, layer=0):
    source = open_any(folder)
    return source.cache_scales(f"model.layers.{layer}.self_attn", 2)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("options", [{}, {"granularity": "head", "search": True}], ids=str)
def test_conformance(tmp_path, options):
    check_pass("quant", plugin, "quant.kv_fp8", tmp_path, **options)


def test_scales_are_the_largest_key_and_value_by_head(made, tiny):
    """Against keys and values that the unchanged model computes, hooked by other means."""
    per_head, base, _, text = made("llama", kv(granularity="head"))
    per_tensor, *_ = made("llama", kv())
    model = load_model(base).model
    tokenizer = load_model(base).tokenizer
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: 4 * 32]).view(4, 32)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for wanted, found, shared in zip((cache.layers[0].keys, cache.layers[0].values), scales(per_head), scales(per_tensor), strict=True):
        torch.testing.assert_close(found * 448, wanted.abs().amax((0, 2, 3)), rtol=1e-5, atol=0)
        assert float(shared) == float(found.max())  # equal heads would make equal scales


def test_equal_heads_round_as_one_tensor():
    x = torch.randn(2, 3, 5, 8)
    assert round_heads(x, torch.full((3,), 0.01)).equal(round_heads(x, torch.tensor([0.01])))
    once = round_heads(x.bfloat16(), torch.tensor([0.013]))
    assert once.dtype == torch.bfloat16 and round_heads(once, torch.tensor([0.013])).equal(once)
    assert float(round_heads(torch.tensor([[[[1e4, 17.0]]]]), torch.tensor([1.0]))[0, 0, 0, 0]) == 448


def test_search_never_loses_to_what_it_starts_from():
    generator = torch.Generator().manual_seed(0)
    best = torch.rand(2, 4, generator=generator) * 10 + 0.8
    start = [torch.ones(4), torch.ones(4)]

    def losses(tried):
        # keys and values act on each other: only one after the other is safe
        return torch.stack([((k - best[0]).square() + (v - best[1]).square() + 3 * (k - 1) * (v - 1) + 1e3).double() for k, v in tried])

    found = search(start, losses)
    assert bool((losses([tuple(found)]) <= losses([tuple(start)])).all()) and not found[0].equal(start[0])
    tied = search(start, lambda tried: torch.zeros(len(tried), 4))
    assert all(found.equal(before) for found, before in zip(tied, start, strict=True))
    assert MULTIPLIERS[0] == 1 and len(MULTIPLIERS) == 51 and MULTIPLIERS[1] == pytest.approx(0.8) and MULTIPLIERS[-1] == pytest.approx(16)


def test_searched_scales_lower_the_error_of_attention(made):
    plain, base, _, _ = made("llama", kv(granularity="head"))
    searched, _, (report,), _ = made("llama", kv(granularity="head", search=True))
    ratio = scales(searched)[0] / scales(plain)[0]
    assert torch.tensor(report["k_multiplier"][0]).allclose(ratio, rtol=1e-5)
    model = load_model(base).model
    attention = model.model.layers[0].self_attn
    seen = {}

    def error(folder):
        k_scale, v_scale = scales(folder)

        def look(query, key, value, attend):
            out = attend(query, key, value)
            seen[folder] = float((attend(query, round_heads(key, k_scale), round_heads(value, v_scale))[0] - out[0]).square().sum())
            return out

        with tapped(attention, look):
            logits(model)
        return seen[folder]

    assert error(searched) < error(plain)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "qwen3_moe", "qwen3_next", "qwen3_vl", "hunyuan_v1_moe"])
def test_any_architecture_with_keys_and_values(made, architecture):
    out, base, _, _ = made(architecture, kv(granularity="head"), dtype="bfloat16")
    assert validate(out, base)["problems"] == []
    loaded = load_model(out)
    assert loaded.backend == f"transformers, {CACHE}"
    reference = load_model(base).model
    assert not logits(loaded.model).equal(logits(reference))
    assert logits(load_model(out, emulate=False).model).equal(logits(reference))
    stored = [n for n in open_any(out).checkpoint.tensors if n.endswith((".k_scale", ".v_scale"))]
    layers = {"qwen3_next": 1}.get(architecture, 2)  # one of four layers keeps keys and values there
    assert len(stored) == 2 * layers and not any(n in open_any(out).dtypes for n in stored)


def test_latent_caches_and_part_of_a_cache_are_refused(made, tmp_path):
    for architecture, steps, words in (
        ("deepseek_v3", [kv()], "MLA"),
        ("llama", [kv(), kv(granularity="head")], "both settle"),
        ("llama", [{"use": "quant.kv_fp8", "targets": ["layers[0:1]"]}], "as a whole"),
        ("llama", [{"use": "quant.kv_fp8", "ignore": ["v"]}], "as a whole"),
    ):
        with pytest.raises(PlanError, match=words):
            made(architecture, *steps)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_layouts_without_a_place_for_it_are_refused(tiny, made, tmp_path, layout):
    _, base, _, text = made("llama", kv())
    recipe = {"steps": [{"use": "quant.int4_rtn", "with": {"group_size": 32}}, kv()], "calibration": {"data": str(text), "samples": 2, "tokens": 32}}
    with pytest.raises(PlanError, match="fp8 kv cache"):
        compress(base, out=tmp_path / "out", recipe={**recipe, "export": {"format": layout}})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "first", [{"use": "quant.fp8_dynamic"}, {"use": "quant.gptq", "with": {"group_size": 32, "symmetric": False}}], ids=["native", "own reader"]
)
@pytest.mark.parametrize("order", [1, -1], ids=["weights first", "cache first"])
def test_with_quantized_weights(made, first, order):
    out, base, reports, _ = made("llama", *[first, kv(granularity="head")][::order], dtype="bfloat16")
    assert ["linears" in report for report in reports] == [True, False][::order]  # weights are the other step's
    assert validate(out, base)["problems"] == []
    loaded = load_model(out, packed=False)
    native = first["use"] == "quant.fp8_dynamic"
    assert loaded.backend == f"{'transformers' if native else OWN_READER}, {CACHE}"
    # the same weights without the cache, then with it by hand
    plain = load_model(out, emulate=not native, packed=False)
    for index, layer in enumerate(plain.model.model.layers):
        k_scale, v_scale = scales(out, index)
        tap(layer.self_attn, lambda q, k, v, attend, k_scale=k_scale, v_scale=v_scale: attend(q, round_heads(k, k_scale), round_heads(v, v_scale)))
    assert logits(loaded.model).equal(logits(plain.model))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"


def test_generation_reads_the_same_cache(made):
    out, _, _, _ = made("llama", kv())
    model = load_model(out).model
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits[:, -1]
        first = model(IDS[:, :-5], use_cache=True)
        rest = model(IDS[:, -5:], past_key_values=first.past_key_values).logits[:, -1]
    torch.testing.assert_close(whole, rest, rtol=1e-4, atol=1e-5)


def test_layers_after_are_fed_a_rounded_cache(made):
    """The scales of the second layer are those of keys behind a first layer that reads FP8."""
    out, base, _, text = made("llama", kv())
    model, tokenizer = (loaded := load_model(out)).model, loaded.tokenizer
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: 4 * 32]).view(4, 32)
    with torch.no_grad():
        rounded, exact = (m(ids, use_cache=True).past_key_values.layers[1].keys.abs().max() for m in (model, load_model(base).model))
    assert float(rounded) == pytest.approx(448 * float(scales(out, 1)[0]), rel=1e-6) and float(exact) != pytest.approx(float(rounded), rel=1e-6)


def test_hostile_and_unknown_folders_do_not_load(made, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def copy(name, config=None, **tensors):
        folder = shutil.copytree(made("llama", kv())[0], tmp_path / name)
        if config:
            content = json.loads((folder / "config.json").read_text())
            content["quantization_config"]["kv_cache_scheme"].update(config)
            (folder / "config.json").write_text(json.dumps(content))
        stored = load_file(folder / "model.safetensors")
        stored.update({f"model.layers.1.self_attn.{n}": t for n, t in tensors.items()})
        save_file({n: t for n, t in stored.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    for folder, words in (
        (copy("int8", {"type": "int"}), "not known"),
        (copy("dynamic", {"dynamic": True}), "not known"),
        (copy("asymmetric", {"symmetric": False}), "not known"),
        (copy("heads", {"strategy": "attn_head"}), "2 positive scales"),
        (copy("missing", k_scale=None), "missing"),
        (copy("nan", v_scale=torch.tensor([float("nan")])), "positive scales"),
        (copy("zero", v_scale=torch.zeros(1)), "positive scales"),
    ):
        with pytest.raises(ModelError, match=words):
            load_model(folder)
        assert not validate(folder)["ok"]


def test_plan_and_verdicts_name_the_cache(made):
    out, _, _, _ = made("llama", kv(granularity="head"))
    plan = json.loads((out / "angelslim/plan.json").read_text())
    assert plan["kv_cache"] == "fp8 kv cache per head" and plan["plan"][0]["tensors"] == 4
    assert plan["engines"]["vllm"]["ok"] and "FlashAttention 3" in plan["engines"]["vllm"]["why"]
    assert not plan["engines"]["transformers"]["ok"] and not plan["engines"]["sglang"]["ok"]
    assert validate(out)["engines"] == plan["engines"]
    ledger = json.loads((out / "angelslim/ledger.json").read_text())
    assert {entry["fate"] for entry in ledger.values()} == {"copied"}
