"""Static FP8 with searched input scales: candidates against their definition, and what the search may never do."""

import pytest
import torch

import angelslim_quant.plugin as plugin
from angelslim_core import compress
from angelslim_core.errors import NumericError
from angelslim_core.rounding import cast_e4m3
from angelslim_core.source import open_any
from angelslim_core.testing.conformance import check_pass
from angelslim_core.validation import validate
from angelslim_quant.numerics.magnitudes import Magnitudes
from angelslim_quant.passes import lepto
from angelslim_quant.passes.lepto import clipped, shifted


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.mark.parametrize("variant", ["clip", "ratio"])
def test_conformance(tmp_path, variant):
    check_pass("quant", plugin, "quant.lepto", tmp_path, variant=variant)


def seen(*parts):
    found = Magnitudes()
    for part in parts:
        found.add("x", part)
    return found


def test_quantiles_are_exact_and_do_not_depend_on_the_cut():
    x = (torch.randn(1000, 37) * torch.logspace(-6, 6, 37)).bfloat16()
    whole, parts = seen(x), seen(*x.flip(0).split(123))
    ordered = x.abs().flatten().float().sort().values
    n = ordered.numel()
    for p in (0.0, 0.5, 0.999, 0.9994, 0.99985, 1.0):
        assert whole.quantile(p) == parts.quantile(p) == float(ordered[min(round(n * p), n - 1)])
    assert whole.counts.equal(parts.counts) and float(whole.peak) == float(parts.peak) == float(ordered[-1])
    assert seen(torch.zeros(0, 4)).quantile(0.5) == 0
    wide = seen(torch.tensor([[1.0, 3.14159265]]))
    assert float(wide.peak) == pytest.approx(3.14159265) and wide.quantile(1.0) == pytest.approx(3.14159265, rel=2**-8)
    with pytest.raises(NumericError):
        seen(torch.tensor([float("nan")]))


def test_candidates_follow_their_definitions():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0] = 1000.0
    found, ordered = seen(x), x.abs().float().sort().values
    n = ordered.numel()
    assert clipped(found) == [1000.0, *(float(ordered[min(round(n * (1 - a)), n - 1)]) for a in (1e-4, 2e-4, 5e-4, 1e-3))]
    s0 = 1000 / 448
    wanted = []
    for r in range(8, 21):
        v = ordered[min(round(n * (0.999 + 5e-5 * r)), n - 1)]
        wanted.append(1000.0 / float(cast_e4m3(v / s0)))
    assert shifted(found)[0] == 1000.0 and [r / 448 for r in shifted(found)[1:]] == pytest.approx(wanted)
    assert min(shifted(found)) >= 1000.0 and shifted(found)[-1] == 1000.0  # this form never cuts
    for nothing in (seen(torch.zeros(5)), Magnitudes()):
        assert set(clipped(nothing)) == set(shifted(nothing)) == {0.0}


def spied(monkeypatch):
    """Feeds and losses of every layer that a run treats."""
    found = []
    losses = lepto._losses

    def spy(layer, feeds):
        result = losses(layer, feeds)
        found.append((feeds, result))
        return result

    monkeypatch.setattr(lepto, "_losses", spy)
    return found


def quantized(folder, out, text, use="quant.lepto", **options):
    recipe = {"steps": [{"use": use, "with": options}], "calibration": {"data": str(text), "samples": 4, "tokens": 32}}
    result = compress(folder, out=out, recipe=recipe)
    source = open_any(out)
    return result, {name: float(source.read_quantized(name).input_scale) for name in source.quantized}


def edited(folder, change):
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("variant", ["clip", "ratio"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_the_choice_never_loses_to_the_largest_input(tiny, tmp_path, text, monkeypatch, architecture, variant):
    found = spied(monkeypatch)
    result, scales = quantized(tiny(architecture), tmp_path / "out", text, variant=variant)
    assert validate(tmp_path / "out", tiny(architecture))["problems"] == [] and not result.fallbacks
    isolated = 0
    for feeds, losses in found:
        assert bool((losses[:, 0] > 0).all())  # rounding shows in every block
        for feed, row in zip(feeds, losses.tolist(), strict=True):
            best = row.index(min(row))
            isolated += best > 0
            for members, ranges in zip(feed.sets, feed.ranges, strict=True):
                assert all(scales[site.name] == pytest.approx(ranges[best] / 448) for site in members)
    assert result.passes[0]["metrics"]["feeds_with_outliers_isolated"] == isolated
    blocks = {feed.block for feeds, _ in found for feed in feeds}
    assert blocks == ({"self_attn", "mlp", "linear_attn"} if architecture == "qwen3_next" else {"self_attn", "mlp"})


def test_an_outlier_that_nothing_reads_is_cut_off(tiny_copy, tmp_path, text, monkeypatch):
    """One channel of 4096 is 1e6 times the others, and the weights that read it are zero."""

    def change(stored):
        stored["model.layers.0.post_attention_layernorm.weight"][7] = 1e6
        for role in ("gate", "up"):
            stored[f"model.layers.0.mlp.{role}_proj.weight"][:, 7] = 0

    folder = edited(tiny_copy("llama", hidden_size=4096, num_hidden_layers=1, intermediate_size=32, dtype="float32"), change)
    found = spied(monkeypatch)
    _, scales = quantized(folder, tmp_path / "out", text)
    _, plain = quantized(folder, tmp_path / "plain", text, use="quant.fp8_static")
    ((feeds, losses),) = found
    (row,) = (losses[i] for i, feed in enumerate(feeds) if feed.sets[0][0].role == "gate")
    assert float(row.min()) < 0.1 * float(row[0])
    up = "model.layers.0.mlp.up_proj"
    assert scales[up] < 1e-3 * plain[up] and scales[up] == scales["model.layers.0.mlp.gate_proj"]


def test_a_scale_goes_by_the_input_of_its_own_linear(tiny, tiny_copy, tmp_path, text):
    """Outputs of up made 8 times larger change the input of down, and of no other linear of the layer."""
    folder = edited(tiny_copy("llama", num_hidden_layers=1), lambda stored: stored["model.layers.0.mlp.up_proj.weight"].mul_(8))
    _, before = quantized(tiny("llama", num_hidden_layers=1), tmp_path / "a", text)
    _, after = quantized(folder, tmp_path / "b", text)
    assert {name for name in before if before[name] != after[name]} == {"model.layers.0.mlp.down_proj"}
    assert after["model.layers.0.mlp.down_proj"] == pytest.approx(8 * before["model.layers.0.mlp.down_proj"], rel=0.02)


def test_weights_are_those_of_fp8_static(tiny, tmp_path, text):
    quantized(tiny("llama"), tmp_path / "a", text)
    quantized(tiny("llama"), tmp_path / "b", text, use="quant.fp8_static")
    first, second = open_any(tmp_path / "a"), open_any(tmp_path / "b")
    name = "model.layers.0.mlp.up_proj"
    assert first.read_quantized(name).dequantize().equal(second.read_quantized(name).dequantize())
    assert first.quantized[name] == second.quantized[name]
