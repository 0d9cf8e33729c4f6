"""A third party's trained pass may say how keys and values round: they do so while any model pass trains, and what it left is stored."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file

import angelslim_quant.plugin as quant
from angelslim_core import Grid, ModelPass, PassConfig, PluginHost, Quantized, Scheme, TrainedPass, compress, hookimpl
from angelslim_core.errors import ModelError, PlanError, PluginError
from angelslim_core.fake_cache import FakeCache, place_cache, placed_caches, read_trained_cache, remove_cache, write_trained_cache
from angelslim_core.fake_quant import FakeQuantizer, placed, rounding_off, set_progress
from angelslim_core.kv_cache import round_heads, settled_cache, tapped
from angelslim_core.loading import load_model
from angelslim_core.pipeline import prepare
from angelslim_core.recipe import load_recipe
from angelslim_core.schemes import CacheScheme
from angelslim_core.source import describe_source, open_any
from angelslim_core.testing.conformance import check_pass
from angelslim_core.validation import validate

IDS = torch.arange(3, 67)[None]
seen = {}


class Eighths(FakeQuantizer):
    """Eighths of a row's largest weight, nothing is learnt."""

    trains_weight = False

    def quantized(self, weight_OI):
        scale = (weight_OI.float().abs().amax(1, keepdim=True) / 8).clamp(min=1e-6).to(weight_OI.dtype)
        return Quantized(self.scheme, (weight_OI.float() / scale.float()).round().clamp(-8, 7).to(torch.int8), scale)

    def weight(self, weight_OI):
        return self.quantized(weight_OI).dequantize(weight_OI.dtype)


class Steps(FakeCache):
    """One learnt scale of keys and values."""

    def __init__(self, scales):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((scales,), 2.0**-8))

    def rounded(self, key, value):
        step = self.scale.view(-1, 1, 1)
        return tuple(round_heads(x, self.scale.detach()) + (x.detach() / step.detach() * (step - step.detach())).to(x.dtype) for x in (key, value))

    def scales(self):
        return self.scale, self.scale.clone()


class Toy(TrainedPass):
    """Linears of four bits, and a cache under a learnt scale."""

    id = "toy.cached"

    class Config(PassConfig):
        heads: bool = Field(False, description="A scale for each head.")

    @property
    def cache(self):
        return CacheScheme("attn_head" if self.config.heads else "tensor")

    @property
    def trains_weight(self):
        return False

    def scheme(self, site):
        return Scheme("int4 rows", Grid(4, "int", "channel", scale_dtype=site.dtype))

    def quantizer(self, site, weight):
        return Eighths(self.scheme(site))

    def cache_quantizer(self, heads):
        return Steps(heads if self.config.heads else 1)


class Train(ModelPass):
    """Knows nothing of caches: moves every parameter that requires a gradient against it."""

    id = "toy.train"

    def run(self, model, context):
        parameters = {name: p for name, p in model.named_parameters() if "quantizer" in name}
        with torch.no_grad(), rounding_off(model):
            wanted = model.eval()(IDS).logits
        set_progress(model, 0.5)
        (model(IDS).logits - wanted).square().sum().backward()
        seen["gradients"] = {name: float(p.grad.abs().sum()) for name, p in parameters.items()}
        with torch.no_grad():
            for p in parameters.values():
                p.mul_(1 + 0.5 * p.grad.sign())
            seen["logits"], seen["progress"] = model(IDS).logits, {q.progress for q in placed_caches(model).values()}
        return {"rounded": len(placed(model)), "caches": len(placed_caches(model))}


@hookimpl
def angelslim_register_passes():
    return [Toy, Train]


MODULE = SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes)


def run(model, out, *steps, **recipe):
    host = PluginHost()
    host.register_module("toy", MODULE)
    host.register_module("quant", quant)
    given = {"recipe": {"steps": [{"use": s} if isinstance(s, str) else s for s in steps], **recipe}, "plugins": ["toy", "quant"], "host": host}
    return prepare(model, **given) if out is None else compress(model, out=out, **given)


def logits(folder):
    with torch.no_grad():
        return load_model(folder, "cpu", own_reader=True).model(IDS).logits


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("architecture", "dtype", "targets"),
    [("llama", "float32", None), ("qwen3", "bfloat16", ["mlp"]), ("llava", "float32", ["attention"]), ("qwen3_next", "float32", ["attention"])],
)
def test_what_is_stored_is_what_was_trained(tiny, tmp_path, architecture, dtype, targets, heads):
    """In any architecture with keys and values, also in layers of which no linear is targeted."""
    model = tiny(architecture, dtype=dtype)
    step = {"use": "toy.cached", "with": {"heads": heads}, **({"targets": targets} if targets else {})}
    result = run(model, tmp_path / "o", step, "toy.train")
    layers = 1 if architecture == "qwen3_next" else 2
    assert result.passes[1]["metrics"]["caches"] == layers and seen["progress"] == {0.5}
    assert len(seen["gradients"]) == layers and all(seen["gradients"].values())
    assert torch.equal(logits(tmp_path / "o"), seen["logits"])
    stored = {n: t for n, t in load_file(tmp_path / "o/model.safetensors").items() if n.endswith(("k_scale", "v_scale"))}
    assert len(stored) == 2 * layers and all(t.shape == (2 if heads else 1,) and float(t[0]) in (2.0**-9, 1.5 * 2.0**-8) for t in stored.values())
    assert result.passes[0]["metrics"]["k_scale"] == [float(t.max()) for n, t in stored.items() if n.endswith("k_scale")]
    found = validate(tmp_path / "o", model, run=True)
    assert found["ok"], found["problems"]


def test_the_kit_knows_trained_caches(tmp_path):
    check_pass("toy", MODULE, "toy.cached", tmp_path, heads=True)


def test_the_kit_finds_a_cache_that_is_not_stored_as_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(Steps, "scales", lambda self: (self.scale * 1.5, self.scale))
    with pytest.raises(AssertionError, match="what is stored of the cache is not what is trained"):
        check_pass("toy", MODULE, "toy.cached", tmp_path)


def test_a_calibrated_step_after_training_is_fed_through_the_trained_cache(tiny, tmp_path):
    """What it stores is as if the model were loaded with the cache that training left."""
    model = tiny(dtype="float32", initializer_range=0.2)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 4, "tokens": 16, "batch_size": 4}
    static = {"use": "quant.fp8_static", "targets": ["layers[1:2].o"], "with": {}}
    first = {"use": "toy.cached", "targets": ["layers[0:1].mlp"]}
    run(model, tmp_path / "o", first, "toy.train", static, calibration=calibration)
    run(model, tmp_path / "plain", first, "toy.train")
    before, after = load_file(tmp_path / "plain/model.safetensors"), load_file(tmp_path / "o/model.safetensors")
    assert all(torch.equal(before[n], after[n]) for n in before if n.endswith(("k_scale", "v_scale")))
    loaded = load_model(tmp_path / "plain", "cpu")
    ids = torch.tensor(loaded.tokenizer((tmp_path / "text.txt").read_text(), add_special_tokens=False)["input_ids"][: 4 * 16]).view(4, 16)
    largest = {}
    for name, folder in (("rounded", tmp_path / "plain"), ("exact", model)):
        read = load_model(folder, "cpu").model
        read.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args, name=name: largest.update({name: float(args[0].abs().max())}))
        with torch.no_grad():
            read(ids)
    scale = float(after["model.layers.1.self_attn.o_proj.input_scale"])
    assert scale * 448 == pytest.approx(largest["rounded"], rel=1e-5) and largest["exact"] != pytest.approx(largest["rounded"], rel=1e-4)


def test_a_tap_comes_before_the_quantizer_of_an_attention(tiny):
    model = load_model(tiny(dtype="float32"), "cpu").model
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        exact = model(IDS).logits
        place_cache(attention, Steps(1))
        rounded = model(IDS).logits
        with tapped(attention, lambda query, key, value, attend: attend(query, key, value)):
            assert model(IDS).logits.equal(exact)
        with rounding_off(model):
            assert model(IDS).logits.equal(exact)
        assert model(IDS).logits.equal(rounded) and not rounded.equal(exact)
        assert [float(s) for s in remove_cache(attention)] == [2.0**-8] * 2 and model(IDS).logits.equal(exact)


def test_scales_of_another_shape_are_not_kept_and_missing_ones_are_said(tmp_path):
    with pytest.raises(PluginError, match="per head has"):
        write_trained_cache(tmp_path, {"a": (torch.ones(1), torch.ones(1))}, CacheScheme("attn_head"), 2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="no step has trained the cache"):
        read_trained_cache(tmp_path, "a")
    write_trained_cache(tmp_path, {"a": (torch.ones(2), torch.full((2,), 3.0))}, CacheScheme("attn_head"), 2)
    assert [scale.tolist() for scale in read_trained_cache(tmp_path, "a")] == [[1, 1], [3, 3]] and len(list(tmp_path.iterdir())) == 1


def test_a_model_without_keys_and_values_is_refused(tiny):
    """Of which all layers keep something else, as linear attention does."""
    source = open_any(tiny("qwen3_next"))
    description = describe_source(source, PluginHost().registry.layouts)
    without = type(description)(**{**vars(description), "sites": tuple(s for s in description.sites if s.role not in ("q", "k", "v"))})
    recipe = load_recipe({"steps": [{"use": "toy.cached"}, {"use": "toy.train"}]})
    assert settled_cache(recipe, [Toy(), Train()], description) == CacheScheme("tensor")
    with pytest.raises(PlanError, match="no layer of this model keeps any") as caught:
        settled_cache(recipe, [Toy(), Train()], without)
    assert caught.value.number == 1000
