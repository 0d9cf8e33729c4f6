"""GPTQ, GPTAQ, AWQ, smoothing and learned rounding against their definitions, and that each is worth its calibration."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import angelslim_quant.plugin as plugin
from angelslim_core import compress, evaluate
from angelslim_core.adapters.base import Site
from angelslim_core.errors import NumericError
from angelslim_core.layer import LayerBatch
from angelslim_core.parallel import Group
from angelslim_core.schemes import Grid, Quantized, Scheme, dequantize
from angelslim_core.testing.conformance import check_pass
from angelslim_quant.numerics import fp8
from angelslim_quant.numerics.compensate import Moments, compensate, inverse_factor
from angelslim_quant.numerics.integer import quantize, range_of, scale_of, search_range, steps
from angelslim_quant.passes.learned_rounding import Rounder
from angelslim_quant.passes.nvfp4 import NVFP4
from angelslim_quant.passes.smooth import _losses, smoothing
from angelslim_quant.sinks import token_weights

GRID = Grid(4, "int", "group", 32)
ASYM = Grid(4, "int", "group", 32, symmetric=False)


def problem(seed, outputs=24, inputs=64, rows=512):
    """A weight and inputs whose columns are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(rows, inputs, generator=generator) @ mix


def moments_of(x, reference=None):
    moments = Moments()
    moments.add(x, reference)
    return moments


def round_with(weight, moments, grid, **options):
    scale, zero = scale_of(*range_of(weight, grid), grid)
    codes = compensate(weight, moments.hessian, steps(scale, zero, grid), grid.group_size, drift_II=moments.drift, **options).levels.to(torch.int8)
    return codes, dequantize(codes, scale, zero, grid), dequantize(*quantize(weight, grid, scale, zero), grid)


@pytest.mark.parametrize(
    ("pass_id", "options"),
    [
        ("quant.gptq", {"group_size": 32}),
        ("quant.gptq", {"group_size": 32, "symmetric": False, "bits": 3, "act_order": False, "true_sequential": False}),
        ("quant.gptaq", {"group_size": 32}),
        ("quant.awq", {"group_size": 32, "grid": 4}),
        ("quant.awq", {"group_size": 32, "grid": 4, "symmetric": True, "clip": False}),
        ("quant.smooth", {}),
        ("quant.fp8_static", {"gptq": True}),
        ("quant.lepto", {"gptq": True}),
        ("quant.learned_rounding", {"group_size": 32, "iterations": 3}),
        ("quant.learned_rounding", {"group_size": 32, "iterations": 3, "start": "nearest", "symmetric": False}),
    ],
)
def test_conformance(tmp_path, pass_id, options):
    check_pass("quant", plugin, pass_id, tmp_path, **options)


def test_moments_do_not_depend_on_the_cut_and_refuse_what_is_not_finite():
    _, x = problem(0)
    whole, parts = moments_of(x), Moments()
    for part in x.split(100):
        parts.add(part)
    assert torch.allclose(whole.hessian, parts.hessian, rtol=1e-5, atol=1e-2)
    assert torch.allclose(whole.hessian, x.T @ x, rtol=1e-4, atol=1e-2)
    whole.add(torch.full((1, 64), float("nan")))
    with pytest.raises(NumericError):
        _ = whole.hessian


def test_inverse_factor_and_its_damping():
    h = moments_of(problem(0)[1]).hessian.double()
    given, order = h.clone(), torch.randperm(64)
    upper, raised = inverse_factor(h, 0.01, order)
    damped = (h + 0.01 * h.diagonal().mean() * torch.eye(64))[order][:, order]
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(64, dtype=torch.float64), atol=1e-6) and raised == 0
    assert torch.equal(upper, upper.triu()) and torch.equal(h, given)
    dead = torch.zeros(4, 4)
    assert torch.isfinite(inverse_factor(dead, 0.01, torch.arange(4))[0]).all()
    indefinite = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # needs more than .01 on the diagonal
    upper, raised = inverse_factor(indefinite, 0.01, torch.arange(2))
    assert raised > 0 and torch.allclose(upper.T @ upper @ (indefinite + 0.01 * (1 + raised) * torch.eye(2)), torch.eye(2), atol=1e-4)


@pytest.mark.parametrize("grid", [GRID, ASYM])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_beats_nearest_on_the_same_grid(grid, act_order):
    for seed in range(4):
        weight, x = problem(seed)
        moments = moments_of(x)
        codes, value, nearest = round_with(weight, moments, grid, act_order=act_order)
        errors = [float(((q - weight) @ moments.hessian * (q - weight)).sum()) for q in (value, nearest)]
        assert errors[0] < (0.9 if act_order else 0.97) * errors[1]
        assert codes.min() >= -8 and codes.max() <= 7


def test_gptq_beats_nearest_in_fp8():
    for seed in range(4):
        weight, x = problem(seed)
        codes, scale = fp8.quantize(weight, Grid(8, "float", "tensor"))
        hessian = moments_of(x).hessian
        found = compensate(weight, hessian, fp8.element_steps(scale, len(weight)), None).levels
        assert torch.equal(found, found.to(torch.float8_e4m3fn).float())
        errors = [float(((q * scale - weight) @ hessian * (q * scale - weight)).sum()) for q in (found, codes.float())]
        assert errors[0] < 0.7 * errors[1]


def test_gptq_with_a_diagonal_hessian_is_rounding_to_nearest():
    weight, _ = problem(1)
    moments = moments_of(torch.diag(torch.logspace(-1, 1, 64)))
    _, value, nearest = round_with(weight, moments, GRID)
    assert torch.equal(value, nearest)


def test_a_dead_input_is_rounded_to_zero():
    weight, x = problem(2)
    x[:, 5] = 0
    codes, _, _ = round_with(weight, moments_of(x), GRID)
    assert not codes[:, 5].any() and codes[:, 6].any()


def test_gptq_goes_over_its_block_edges(monkeypatch):
    weight, x = problem(3)
    whole = round_with(weight, moments_of(x), GRID)[0]
    monkeypatch.setattr("angelslim_quant.numerics.compensate.BLOCK", 10)
    assert (round_with(weight, moments_of(x), GRID)[0] == whole).float().mean() > 0.99  # sums in another order may tip a tie


def test_gptaq_without_drift_is_gptq_and_with_drift_is_closer():
    ours = theirs = 0.0
    for seed in range(6):
        weight, reference = problem(seed)
        assert torch.equal(round_with(weight, moments_of(reference, reference), GRID)[0], round_with(weight, moments_of(reference), GRID)[0])
        x = reference + 0.3 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed)) * reference.std(0)
        wanted = reference @ weight.T
        theirs += float((x @ round_with(weight, moments_of(x), GRID)[1].T - wanted).square().sum())
        ours += float((x @ round_with(weight, moments_of(x, reference), GRID)[1].T - wanted).square().sum())
    assert ours < theirs


def test_the_range_search_only_lowers_the_weighted_error():
    weight, _ = problem(5)
    importance = torch.logspace(-2, 2, 64)
    for grid in (GRID, ASYM):

        def error(scale, zero, grid=grid):
            return float((dequantize(*quantize(weight, grid, scale, zero), grid) - weight).square().mul(importance).sum())

        assert error(*search_range(weight, grid, importance, (0.9, 0.8, 0.7, 0.6))) < error(*scale_of(*range_of(weight, grid), grid))


def test_smoothing_measures_the_error_of_rounding_both_sides():
    x, weight, scales = torch.randn(6, 8), torch.randn(4, 8), [torch.ones(8), torch.rand(8) + 0.5]

    def rounded(rows):
        step = rows.abs().amax(1, keepdim=True) / 127
        return (rows / step).round() * step

    expected = [float((rounded(x / s) @ rounded(weight * s).T - x @ weight.T).square().sum()) for s in scales]
    given = x.clone(), weight.clone()
    assert _losses(*given, scales) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(given[0], x) and torch.equal(given[1], weight)


def test_smoothing_follows_its_formula_and_survives_zeros():
    s = smoothing(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 0.25]), 0.5)
    assert float(s[0]) == 2.0 and torch.isfinite(s).all() and (s > 0).all()


@pytest.mark.parametrize("grid", [GRID, ASYM])
def test_an_untrained_rounder_is_its_start(grid):
    weight, _ = problem(6)
    start = Quantized(Scheme("x", grid), *quantize(weight, grid))
    rounder = Rounder(weight, start)
    assert torch.equal(rounder.result().codes, start.codes) and torch.equal(rounder.result().scale, start.scale)
    assert torch.equal(rounder.weight().detach(), start.dequantize())
    rounder.weight().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in (rounder.shift, rounder.factor))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "box", "with", "a", "frozen", "pumpkin"]
    generator = torch.Generator().manual_seed(0)
    path.write_text(" ".join(words[i] for i in torch.randint(len(words), (600,), generator=generator).tolist()))
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "deepseek_v3"])
def test_training_and_compensation_pay_on_a_model(tiny, tmp_path, text, architecture):
    folder = tiny(architecture)
    kl = {}
    for use, more in (("int4_rtn", []), ("gptq", []), ("learned_rounding", ["steps[0].with.iterations=30"])):
        overrides = ["steps[0].with.group_size=16", "steps[0].with.bits=3", *more]
        if use != "int4_rtn":
            overrides += [f"calibration.data={text}", "calibration.samples=16", "calibration.tokens=64", "calibration.batch_size=8"]
        result = compress(model=folder, use=[f"quant.{use}"], out=tmp_path / use, overrides=overrides)
        assert not result.fallbacks
        kl[use] = evaluate(tmp_path / use, folder, text=text, windows=4, length=128)["kl"]
    assert kl["gptq"] < kl["int4_rtn"] and kl["learned_rounding"] < kl["gptq"], kl


def test_training_draws_the_same_samples_whatever_the_batches_are(tiny, tmp_path, text):
    codes = []
    for size in (1, 3):
        overrides = ["steps[0].with.group_size=16", "steps[0].with.iterations=6", "steps[0].with.start=nearest", f"calibration.data={text}",
                     "calibration.samples=12", "calibration.tokens=32", f"calibration.batch_size={size}"]  # fmt: skip
        out = compress(model=tiny(dtype="float32"), use=["quant.learned_rounding"], out=tmp_path / str(size), overrides=overrides).path
        codes.append(load_file(out / "model.safetensors"))
    for name in (n for n in codes[0] if n.endswith("weight_packed")):
        nibbles = [torch.stack([found[name] >> 4 * i & 15 for i in range(8)]) for found in codes]
        assert (nibbles[0] == nibbles[1]).float().mean() > 0.99  # fp32 sums in another order


def test_a_texts_first_token_counts_a_sixteenth_of_its_sample():
    batch = LayerBatch(None, torch.tensor([[True] * 64, [True] * 8 + [False] * 56]))
    weights = token_weights(batch, 1 / 16)
    assert weights.tolist() == [4.0] + [1.0] * 71 and token_weights(batch, 0) is None
    x = torch.randn(72, 8)
    weighted, plain = Moments(), moments_of(torch.cat([x, x[:1], x[:1], x[:1]]))
    weighted.add(x, None, weights)
    assert torch.allclose(weighted.hessian, plain.hessian, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gptq", [True, False])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nvfp4_refuses_inputs_that_are_not_finite(gptq, value):
    site = Site("l.q", "l.q.weight", "q", 0, (8, 16), "BF16")
    x = torch.randn(4, 16)
    layer = SimpleNamespace(
        sites=(site,), batches=[LayerBatch(None, torch.ones(1, 4, dtype=torch.bool))], context=SimpleNamespace(group=Group(), device="cpu"),
        observe=lambda see, *_, **__: see(site, x),
    )  # fmt: skip
    step = NVFP4(NVFP4.Config(gptq=gptq))
    step._survey(layer, {"input_scales_of_siblings": 0})
    x[2, 3] = value
    with pytest.raises(NumericError, match="not finite"):
        step._survey(layer, {"input_scales_of_siblings": 0})
