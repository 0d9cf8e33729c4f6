"""Artifacts with a sparse policy: made, loaded, evaluated, and refused where they are hostile."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import angelslim_sparseattn.plugin
from angelslim_core import compress, load
from angelslim_core.cli.main import cli, main
from angelslim_core.errors import ModelError, PlanError, RecipeError
from angelslim_core.evaluation import evaluate
from angelslim_core.testing.conformance import check_pass, check_plugin
from angelslim_core.validation import validate
from angelslim_sparseattn.config import SparseAttentionConfig
from angelslim_sparseattn.coupling import attachment
from angelslim_sparseattn.passes import PASSES
from angelslim_sparseattn.policies import CLASSES

SMALL = {"block": 16, "min_len": 32, "dense_layers": []}
STEM = {"rate": 0.1, "n_init": 16, "n_local": 16}
STEP = {"use": "sparseattn.stem", "with": {**SMALL, **STEM}}
LENGTH = 150


def tokens(*shape):
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(0))


def made(model, out, *steps, **changes):
    compress(model, out=out, recipe={"steps": [*steps, {**STEP, "with": {**STEP["with"], **changes}}]})
    return out


@pytest.fixture(scope="module")
def artifact(tiny, tmp_path_factory):
    """FP8 weights and Stem; read it only."""
    return made(tiny("qwen3"), tmp_path_factory.mktemp("artifact") / "out", {"use": "quant.fp8_dynamic"})


@pytest.fixture
def hostile(artifact, tmp_path):
    """hostile(policy): an artifact with that policy instead."""

    def make(policy, pass_id="sparseattn.stem"):
        folder = shutil.copytree(artifact, tmp_path / "out", dirs_exist_ok=True)
        (folder / "angelslim/runtime.json").write_text(json.dumps({"policies": [{"pass": pass_id, "policy": policy}]}))
        return folder

    return make


def test_every_policy_is_a_pass():
    host = check_plugin("sparseattn", angelslim_sparseattn.plugin)
    assert [*host.registry.passes] == [f"sparseattn.{name}" for name in CLASSES]
    assert host.default_steps(["sparseattn"], "cpu") == [{"use": "sparseattn.stem"}]


@pytest.mark.parametrize("name", ["a_shape", "stem"])
def test_passes_keep_what_they_promise(name, tmp_path):
    check_pass("sparseattn", angelslim_sparseattn.plugin, f"sparseattn.{name}", tmp_path, **SMALL)


@pytest.mark.parametrize("pass_", PASSES, ids=lambda p: p.name)
def test_every_policy_runs_from_an_artifact(pass_, tiny, tmp_path):
    compress(tiny("qwen3"), out=tmp_path / "o", recipe={"steps": [{"use": pass_.id, "with": SMALL}]})
    model, _ = load(tmp_path / "o", device="cpu")
    with torch.no_grad():
        assert model(tokens(1, LENGTH)).logits.isfinite().all()
    assert attachment(model).config.policy == pass_.name and attachment(model).stats()[0]["sparse"] == 1
    record = json.loads((tmp_path / "o/angelslim/runtime.json").read_text())["policies"][0]["policy"]
    assert SparseAttentionConfig.model_validate(record) == pass_.Config(**SMALL).attention(pass_.name)
    options = record["options"].keys()
    assert options == pass_.Config.model_fields.keys() - {"min_len", "dense_layers", "block", "executor", "overrides", "chosen_for"}


@pytest.mark.parametrize("packed", [False, True])
def test_sparse_prefill_over_quantized_weights(artifact, packed):
    model, _ = load(artifact, device="cpu", packed=packed)
    ids, attached = tokens(2, LENGTH), attachment(model)
    with torch.no_grad():
        sparse = model(ids).logits
        assert all(row["sparse"] == 1 and row["density"] < 0.7 for row in attached.stats())
        written = model.generate(ids, max_new_tokens=4, do_sample=False)
        attached.detach()
        dense = model(ids).logits
    assert written.shape == (2, LENGTH + 4)
    assert 1e-3 < float((sparse - dense).float().norm() / dense.float().norm()) < 1


def test_full_budget_in_bf16_is_the_dense_model(tiny, tmp_path):
    model, _ = load(made(tiny("qwen3", num_hidden_layers=12), tmp_path / "o", rate=1.0), device="cpu")
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        sparse = model(ids).logits.float()
        attachment(model).detach()
        dense = model(ids).logits.float()
    assert float((sparse - dense).norm() / dense.norm()) < 0.05
    top, found = dense.topk(2), sparse.argmax(-1)
    sure = top.values[..., 0] - top.values[..., 1] > 0.05
    assert found.equal(top.indices[..., 0]) or found[sure].equal(top.indices[..., 0][sure])


def test_a_quantized_cache_is_read_sparsely(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    recipe = {"steps": [{"use": "quant.kv_fp8"}, STEP], "calibration": {"data": str(text), "samples": 4, "tokens": 32}}
    compress(tiny("qwen3"), out=tmp_path / "o", recipe=recipe)
    model, _ = load(tmp_path / "o", device="cpu")
    with torch.no_grad():
        rounded = model(tokens(1, LENGTH)).logits
        plain = load(made(tiny("qwen3"), tmp_path / "p"), device="cpu")[0](tokens(1, LENGTH)).logits
    assert attachment(model).stats()[1]["sparse"] == 1
    assert 1e-4 < float((rounded - plain).float().norm() / plain.float().norm()) < 0.3


def test_eval_and_validate_run_the_policy(artifact, tiny, tmp_path):
    found = validate(artifact, tiny("qwen3"), run=True)
    assert found["ok"], found["problems"]
    text = tmp_path / "text.txt"
    text.write_text("sphinx of black quartz, judge my vow; " * 40)
    sparse = evaluate(artifact, tiny("qwen3"), text=text, windows=2, length=LENGTH, device="cpu")
    dense = evaluate(
        made(tiny("qwen3"), tmp_path / "d", {"use": "quant.fp8_dynamic"}, min_len=LENGTH + 1), tiny("qwen3"), text=text, windows=2, length=LENGTH, device="cpu"
    )
    assert sparse["kl"] > 2 * dense["kl"] > 0


def test_plugins_alone_and_shipped_recipes_give_an_artifact(tiny, tmp_path):
    by_share = {"score": "mass", "tau": 0.975, "alpha": 0.95, "n_init": 128, "n_local": 256}
    for out, arguments, options in (
        ("a", ["--plugins", "quant,sparseattn"], {}), ("b", ["fp8_stem"], {}), ("c", ["stem"], {}), ("d", ["--use", "sparseattn.xattention"], {}),
        ("e", ["stem_share"], by_share),
    ):  # fmt: skip
        result = CliRunner().invoke(cli, ["run", *arguments, "--model", str(tiny("qwen3")), "--out", str(tmp_path / out), "--json"])
        assert result.exit_code == 0, result.output
        config = attachment(load(tmp_path / out, device="cpu")[0]).config
        assert (config.policy, config.min_len, config.dense_layers) == ("xattention" if out == "d" else "stem", 8192, (0, 1))
        assert options.items() <= config.options.items()


def test_the_example_of_the_readme_runs(capsys):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    said = capsys.readouterr().out
    assert said.count("'sparse': 1") == 3 and "{'dense layer': 1}" in said


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"rate": 2}, RecipeError, "rate"), ({"block": 20}, RecipeError, "block"), ({"executor": "fast"}, RecipeError, "executor"),
        ({"overrides": [{"layers": [0], "policy": "nonsense"}]}, RecipeError, "nonsense"), ({"bias": 3, "rate": None}, RecipeError, "bias"),
        ({"overrides": [{"layers": [2], "policy": "dense"}]}, PlanError, "layer 2 of a model with 2"),
        ({"overrides": [{"layers": [1], "heads": [4], "policy": "dense"}]}, PlanError, "head 4 of a model with 4"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(tiny, tmp_path, wrong, error, says):
    with pytest.raises(error, match=says):
        made(tiny("qwen3"), tmp_path / "o", **wrong)
    assert not (tmp_path / "o").exists()


def test_steps_that_do_not_fit(tiny, tmp_path):
    for steps, says in (([STEP, STEP], "exclude"), ([{"use": "sparseattn.cosa"}, STEP], "exclude"), ([{**STEP, "targets": ["attention"]}], "as a whole")):
        with pytest.raises(PlanError, match=says):
            compress(tiny("qwen3"), out=tmp_path / "o", recipe={"steps": steps})


GOOD = {"policy": "stem", "options": STEM, **SMALL}
M = 2**31 - 1  # the most tokens that an option may name
EXTREMES = [
    ("a_shape", {"n_init": M, "n_local": M}), ("tri_shape", {"n_init": 0, "n_local": 0, "n_last": M}), ("dilated", {"n_local": 0, "stride": 2**27}),
    ("minference", {"vertical": M, "slash": M}), ("flexprefill", {"tau": 1, "gamma": 1, "min_budget": 16}), ("flexprefill", {"min_budget": M}),
    ("flashprefill", {"alpha": -1, "n_init": M, "n_local": M, "n_last": M}), ("flashprefill", {"alpha": 1e-320, "n_init": M, "n_local": M, "n_last": 0}),
    ("xattention", {"tau": 1e-320, "stride": 16}), ("vecattention", {"theta": 5e-324}), ("cosa", {"p": 1, "delta": M}), ("cosa", {"p": 0, "delta": -M}),
    ("stem", {"rate": 1, "bias": 2**27, "n_init": M, "n_local": M}), ("stem", {"rate": 1e-320, "lam": 1000, "cap": 2**27, "n_init": 0, "n_local": 0}),
    ("stem", {"schedule": "paper", "alpha": 1e-320, "rate": 1, "bias": 2**27}),
]  # fmt: skip
BEYOND = [
    *(("a_shape", {name: n}) for name in ("n_init", "n_local") for n in (2**31, 2**70)), ("tri_shape", {"n_last": 2**63}), ("dilated", {"stride": 2**63}),
    ("minference", {"vertical": 2**63}), ("minference", {"slash": 2**63}), ("flexprefill", {"min_budget": 2**70}), ("flexprefill", {"tau": 2}),
    ("flashprefill", {"alpha": -1e300}), ("flashprefill", {"n_last": 2**70}), ("cosa", {"delta": 1e300}),
    ("cosa", {"stride": 7}), ("xattention", {"stride": 32}), ("stem", {"stride": 5}), ("stem", {"lam": 1e300}),
    ("stem", {"rate": 0.1, "bias": M}), ("stem", {"cap": 2**63}),
]  # fmt: skip


@pytest.mark.parametrize(
    "policy",
    [
        {"policy": "cosa"}, {"policy": 5}, {**GOOD, "options": []}, {**GOOD, "options": {"rate": "x" * 9999}}, {**GOOD, "more": 1}, {**GOOD, "block": 1e9},
        {**GOOD, "block": 2**60}, {**GOOD, "executor": "os.system"}, {**GOOD, "min_len": -1}, {**GOOD, "dense_layers": 3}, {**GOOD, "dense_layers": [2**70]},
        {**GOOD, "overrides": [{"layers": [9], "policy": "dense"}]}, {**GOOD, "overrides": [{"layers": [0], "heads": [99], "policy": "dense"}]},
        {**GOOD, "overrides": [{"layers": [0], "policy": "dense"}] * 5000}, {**GOOD, "overrides": [{"layers": [0], "policy": "__init__"}]}, {**GOOD, "policy": "base"},
        {**GOOD, "options": {"alpha": None, "self": 1}}, {**GOOD, "options": {"name": "cosa"}}, {**GOOD, "min_len": 2**31}, {**GOOD, "dense_layers": [0] * 1025},
        {**GOOD, "chosen_for": {"hidden_size": 10**400}},
        *({**GOOD, "overrides": [{"layers": [0], "policy": name, "options": options}]} for name, options in BEYOND),
    ],
    ids=lambda policy: json.dumps(policy)[:60],
)  # fmt: skip
def test_hostile_policies_are_an_error_of_one_line(hostile, policy):
    with pytest.raises(ModelError) as caught:
        load(hostile(policy), device="cpu")
    assert caught.value.where.startswith("runtime.json: sparseattn.stem") and "\n" not in str(caught.value) and len(str(caught.value)) < 1300


@pytest.mark.parametrize("policy", [{}, *({**GOOD, "overrides": [{"layers": [0], "policy": name, "options": options}]} for name, options in EXTREMES)], ids=str)
def test_hostile_policies_that_load_attend(hostile, policy):
    model, _ = load(hostile(policy), device="cpu")
    with torch.no_grad():
        assert model(tokens(1, LENGTH)).logits.isfinite().all()


@pytest.mark.parametrize(("policy", "pass_id"), [({**GOOD, "block": 17}, "sparseattn.stem"), (GOOD, "sparseattn.base"), ("text", "sparseattn.stem")])
def test_hostile_policies_on_the_command_line(hostile, policy, pass_id, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["chat", str(hostile(policy, pass_id)), "--prompt", "a", "--max-new-tokens", "1"])
    said = capsys.readouterr().err
    assert caught.value.code in (3, 5) and said.startswith("error[AS-") and "Traceback" not in said


def test_two_policies_in_one_artifact(hostile):
    folder = hostile(GOOD)
    record = folder / "angelslim/runtime.json"
    record.write_text(json.dumps({"policies": [{"pass": "sparseattn.stem", "policy": GOOD}] * 2}))
    with pytest.raises(ModelError, match="already"):
        load(folder, device="cpu")
