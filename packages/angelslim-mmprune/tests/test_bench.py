"""What the bench measures, and says."""

import json

import pytest
import torch
from click.testing import CliRunner

from angelslim_core.cli.main import cli
from angelslim_core.errors import UsageError
from angelslim_mmprune.bench import drawn, selection
from angelslim_mmprune.budget import keep_count
from angelslim_mmprune.candidates import candidates
from angelslim_mmprune.models import towers
from angelslim_mmprune.prompts import around, synthetic
from angelslim_mmprune.strategies import CLASSES, make_strategy


def run(*arguments):
    return CliRunner().invoke(cli, ["mmprune", "bench", "--device", "cpu", "--repeats", "1", *arguments])


def test_every_strategy_is_timed(tmp_path):
    done = run("--lengths", "20,48", "--width", "16", "--batch", "2", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert [r["strategy"] for r in found["rows"]] == [*CLASSES] * 2 and found["ttft"] == [] and found["left_out"] == []
    for row in found["rows"]:
        assert row["ms"] > 0 and row["p90_ms"] >= row["ms"] > 0 and row["peak_mib"] is None and 0 < row["kept"] < row["tokens"]
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    page = (tmp_path / "bench.html").read_text()
    assert page.count("<svg") == 1 and "<script" not in page and "random" in page


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl", "qwen2_audio"])
def test_a_model_is_timed_with_and_without(tiny, tmp_path, architecture):
    done = run("--model", str(tiny(architecture)), "--lengths", "16", "--strategies", "random:keep_ratio=.5,random:keep_tokens=3", "--out", str(tmp_path))
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "bench.json").read_text())
    tokens = found["ttft"][0]["tokens"]
    assert [r["strategy"] for r in found["ttft"]] == ["none", "random:keep_ratio=.5", "random:keep_tokens=3"]
    assert [r["kept"] for r in found["ttft"]] == [tokens, tokens // 2, 3] and 10 <= tokens <= 20
    assert all(r["speedup"] == pytest.approx(found["ttft"][0]["ms"] / r["ms"]) for r in found["ttft"][1:])
    assert "speedup" in done.stdout and "random:keep_tokens=3" in done.stdout and (tmp_path / "bench.html").read_text().count("<svg") == 2


def test_all_strategies_that_fit_a_model(tiny):
    done = run("--model", str(tiny("llava")), "--lengths", "4", "--keep-ratio", ".5", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    left_out = {line.partition(":")[0] for line in found["left_out"]}
    assert {r["strategy"] for r in found["ttft"]} == {"none", *CLASSES} - left_out and "samp" in left_out and "idpruner" not in left_out
    assert {r["kept"] for r in found["ttft"] if r["strategy"] in ("idpruner", "divprune", "scope")} == {2}
    assert CliRunner().invoke(cli, ["mmprune", "bench", "--model", "m", "--width", "8"]).exit_code == 2


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl", "qwen3_vl", "qwen2_audio"])
def test_random_media_have_the_size_asked_for(tiny, architecture):
    from angelslim_core.loading import load_model

    model = load_model(tiny(architecture), "cpu").model
    parts = towers(model)
    for wanted in (1, 20, 33):
        inputs = around(model, parts, parts.media.kinds[0], synthetic(parts, parts.media.kinds[0], wanted), [5, 6], [7])
        shown = int((inputs["input_ids"] == 255).sum())
        assert abs(shown - wanted) <= 10 or architecture == "llava"
        with torch.no_grad():
            assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_pools_that_are_drawn_are_whole():
    for name in CLASSES.keys() & {"visionzip", "dart", "divprune"}:
        strategy = make_strategy(name)
        pool = drawn(12, 8, strategy, 3, "cpu")
        assert pool.features.shape == (3, 12, 8) and pool.counts == (12,) * 3 and pool.grids[0][0] == (1, 3, 4) and pool.text is None
        assert {need: x.ndim for need, x in pool.statistics.items()} == {
            need: 2 + (need.statistic in ("keys", "hidden", "raw_keys")) for need in strategy.needs
        }
        assert [x.shape[:2] for x in pool.text_statistics.values()] == [(3, 32)] * len(strategy.text_needs)


def test_strategies_are_named_with_options():
    found = candidates("random:seed=3,random:keep_tokens=4", 0.5)
    assert [(c.strategy.seed, c.strategy.keep_ratio, c.strategy.keep_tokens) for c in found] == [(3, 0.5, None), (0, None, 4)]


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (["--strategies", "random,random"], 894), (["--strategies", "random:seed"], 896), (["--strategies", "random:seed=["], 895), (["--lengths", "0"], 897),
        (["--lengths", "many"], 897), (["--strategies", "nothing"], 801), (["--strategies", "random:seed=-1"], 802), (["--strategies", "random:keep_tokens=999"], 800),
        (["--strategies", "random:seed=1:seed=2"], 856),
    ],
    ids=str,
)  # fmt: skip
def test_bench_refuses(arguments, number):
    done = run("--width", "8", *arguments)
    assert isinstance(done.exception, UsageError) and done.exception.number == number


def test_a_stage_keeps_as_many_as_in_a_model():
    chosen = candidates("pyramiddrop:keep_ratio=.1:layers=[3]:compat=drop,pyramiddrop:keep_ratio=.1:layers=[3]", 0.5)
    rows = selection([35], chosen, width=8, repeats=1)
    # of 3.5, and of what counting dropped ones in floats makes of it
    assert [row["kept"] for row in rows] == [keep_count(35, 0.1, "drop"), keep_count(35, 0.1)] == [3, 4]
