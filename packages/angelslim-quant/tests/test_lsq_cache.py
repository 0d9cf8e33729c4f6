"""`kv` of quant.lsq: keys and values round as `quant.kv_fp8` has them rounded, under scales with LSQ's gradients."""

import copy
import math

import pytest
import torch

import angelslim_quant.plugin as plugin
from angelslim_core import compress, fake_quant
from angelslim_core.errors import NumericError, PlanError, RecipeError
from angelslim_core.fake_cache import place_cache, placed_caches, remove_cache
from angelslim_core.kv_cache import round_cache, round_heads
from angelslim_core.loading import load_model
from angelslim_core.pipeline import prepare
from angelslim_core.source import open_any
from angelslim_core.testing.conformance import check_pass, check_plugin
from angelslim_quant.numerics.fp8 import scale_of
from angelslim_quant.trained.lsq_cache import GRID, LSQCache, RoundedHeads

# magnitudes of E4M3, by its definition
E4M3 = sorted([m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def code_of(ratio):
    """The nearest E4M3 value of a number, the one with the even mantissa on a tie."""
    near = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - abs(ratio)), i % 2))
    return math.copysign(E4M3[near], ratio)


@pytest.mark.parametrize("scales", [1, 2])
def test_gradients_are_those_of_lsq_written_by_hand(scales):
    """In fp64, number by number: straight through inside the range, 0 outside; of the logarithm of the scale."""
    heads, channels = 2, 4
    quantizer = LSQCache(scales)
    logs = [[-5.1, -4.4][:scales], [-6.0, -5.2][:scales]]
    with torch.no_grad():
        for p, values in zip((quantizer.k_log, quantizer.v_log), logs, strict=True):
            p.copy_(torch.tensor(values))
    pair = [(drawn(3, heads, 5, channels, seed=seed) * 2).requires_grad_() for seed in range(2)]
    slopes = [drawn(3, heads, 5, channels, seed=seed) for seed in (2, 3)]
    found = quantizer.rounded(*pair)
    torch.autograd.backward(found, slopes)
    outside = 0
    for x, dy, y, log in zip(pair, slopes, found, (quantizer.k_log, quantizer.v_log), strict=True):
        wanted, of_x, of_y = [0.0] * scales, torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
        for place in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
            b, h, t, d = place
            s = math.exp(float(log[h % scales]))
            ratio, slope = float(x[b, h, t, d]) / s, float(dy[b, h, t, d])
            inside = abs(ratio) <= 448
            code = code_of(ratio) if inside else math.copysign(448, ratio)
            of_y[b, h, t, d], of_x[b, h, t, d] = code * s, slope * inside
            wanted[h % scales] += slope * (code - ratio * inside) * s / math.sqrt(heads * channels / scales * 448)
            outside += not inside
        torch.testing.assert_close(y.double(), of_y, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(x.grad.double(), of_x)
        torch.testing.assert_close(log.grad.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    assert 10 < outside < 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_have_the_dtype_of_what_they_are_of(dtype):
    quantizer = LSQCache(1).train()
    key, value = (drawn(1, 2, 3, 8, seed=seed).to(dtype).requires_grad_() for seed in range(2))
    found = quantizer.rounded(key, value)
    assert all(x.dtype == dtype for x in found)
    (found[0].float().square().sum() + found[1].float().square().sum()).backward()
    for tensor in (key, value, quantizer.k_log, quantizer.v_log):
        assert tensor.grad.dtype == tensor.dtype and bool(tensor.grad.isfinite().all()) and bool(tensor.grad.any())
    with torch.no_grad():  # as if frozen: only the scales have gradients
        key, value = key.detach(), value.detach()
    sum(x.float().sum() for x in quantizer.rounded(key, value)).backward()


def placed_in(model, scales):
    for layer in model.model.layers:
        place_cache(layer.self_attn, LSQCache(scales))
    return model


@pytest.mark.parametrize(("granularity", "scales"), [("tensor", 1), ("head", 2)])
def test_the_first_batch_leaves_what_kv_fp8_calibrates(tiny, tmp_path, granularity, scales):
    """The scales of both layers, of which the second is fed by the rounded first; and at these scales the same keys and values."""
    base = tiny("llama", dtype="float32")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    recipe = {
        "steps": [{"use": "quant.kv_fp8", "with": {"granularity": granularity}}],
        "calibration": {"data": str(tmp_path / "text.txt"), "samples": 4, "tokens": 32, "batch_size": 4},
    }
    compress(base, out=tmp_path / "out", recipe=recipe)
    loaded = load_model(base, "cpu")
    ids = torch.tensor(loaded.tokenizer((tmp_path / "text.txt").read_text(), add_special_tokens=False)["input_ids"][: 4 * 32]).view(4, 32)
    model = placed_in(loaded.model, scales).train()
    with torch.no_grad():
        model(ids)
    for index, quantizer in enumerate(placed_caches(model).values()):
        for found, calibrated in zip(quantizer.scales(), open_any(tmp_path / "out").cache_scales(f"model.layers.{index}.self_attn", 2), strict=True):
            torch.testing.assert_close(found, calibrated, rtol=3e-6, atol=0)
            x = drawn(2, 2, 7, 16, seed=index)
            amax = x.abs().amax((0, 2, 3)) if scales > 1 else x.abs().amax().reshape(1)
            assert RoundedHeads.apply(x, scale_of(amax, GRID)).equal(round_heads(x, amax / 448))
            assert RoundedHeads.apply(x, calibrated).equal(round_heads(x, calibrated))


def test_in_evaluation_a_model_is_what_a_loaded_one_reads(tiny):
    model = placed_in(load_model(tiny("llama", dtype="float32"), "cpu").model, 2)
    plain, ids = copy.deepcopy(model), torch.arange(3, 43)[None]
    for layer in plain.model.layers:
        del layer.self_attn.quantizer
    with torch.no_grad():
        exact = plain(ids).logits
        assert model.eval()(ids).logits.equal(exact)  # nothing is known yet
        with pytest.raises(NumericError, match="no step was trained"):
            next(iter(placed_caches(model).values())).scales()
        model.train()(ids)
        for p in (p for name, p in model.named_parameters() if "quantizer" in name):
            p += 0.3
        trained = model.eval()(ids).logits
        assert not trained.equal(exact)
        with fake_quant.rounding_off(model):
            assert model(ids).logits.equal(exact)
        assert copy.deepcopy(model)(ids).logits.equal(trained)
        for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
            round_cache(other.self_attn, *remove_cache(layer.self_attn))
        assert plain(ids).logits.equal(trained) and model(ids).logits.equal(exact) and not placed_caches(model)


def test_the_first_batch_alone_is_what_scales_begin_with():
    quantizer = LSQCache(2).train()
    quantizer.rounded(torch.tensor([[[[1.0]], [[4.0]]]]), torch.full((1, 2, 1, 1), 3.0))
    k_scale, v_scale = quantizer.scales()
    assert (k_scale * 448).tolist() == pytest.approx([1, 4]) and (v_scale * 448).tolist() == pytest.approx([3, 3])
    quantizer.rounded(torch.full((1, 2, 1, 1), 50.0), torch.ones(1, 2, 1, 1))
    assert quantizer.scales()[0].equal(k_scale)  # later batches are rounded by what is learnt


OTHER = {"bits": 8, "group_size": None, "activations": "int8"}


@pytest.mark.parametrize(
    "options", [{"group_size": 32, "kv": "fp8"}, {"group_size": 32, "kv": "fp8_head", "train_weights": True}, {**OTHER, "kv": "fp8"}, OTHER], ids=str
)
def test_conformance(tmp_path, options):
    check_pass("quant", plugin, "quant.lsq", tmp_path, **options)


def test_only_if_asked_for_the_cache_is_settled():
    pass_class = check_plugin("quant", plugin).registry.find_pass("quant.lsq")
    assert pass_class().cache is None
    assert [pass_class(pass_class.Config(kv=kv)).cache.strategy for kv in ("fp8", "fp8_head")] == ["tensor", "attn_head"]
    with pytest.raises(ValueError, match="kv"):
        pass_class.Config(kv="int8")


def test_what_cannot_be_is_refused_before_any_work(tiny, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd ef"}]}\n' * 8)
    (tmp_path / "t.txt").write_text("the quick brown fox. " * 40)
    kv, train = {"use": "quant.lsq", "with": {"group_size": 32, "kv": "fp8"}}, {"use": "distill.qad", "with": {"data": str(tmp_path / "c.jsonl")}}
    calibration = {"data": str(tmp_path / "t.txt"), "samples": 2, "tokens": 16}
    for architecture, steps, export, error, words in (
        ("llama", [{**kv, "targets": ["attention"]}, {**kv, "targets": ["mlp"]}, train], {}, PlanError, "both settle the KV cache"),
        ("llama", [kv, train, {"use": "quant.kv_fp8"}], {}, PlanError, "both settle the KV cache"),
        ("deepseek_v3", [{**kv, "targets": ["o"]}, train], {}, PlanError, "MLA"),
        ("llama", [kv, train], {"export": {"format": "gptq"}}, PlanError, "fp8 kv cache per tensor"),
        ("llama", [{"use": "quant.lsq", "with": {"kv": "int4"}}, train], {}, RecipeError, "kv"),
        ("llama", [kv], {}, PlanError, "no later step trains"),
    ):
        with pytest.raises(error, match=words):
            prepare(tiny(architecture), recipe={"steps": steps, "calibration": calibration, **export})
    plan = prepare(tiny("qwen3_next"), recipe={"steps": [{**kv, "targets": ["attention"]}, train]}).plan  # one layer of four has keys and values
    assert plan.trains_cache and [name for unit in plan.units for name in unit.outputs if name.endswith("k_scale")] == ["model.layers.3.self_attn.k_scale"]
