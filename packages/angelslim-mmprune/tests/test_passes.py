"""Artifacts that drop media tokens: made, loaded, and refused where they are hostile."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from pydantic import Field

import angelslim_mmprune.plugin
from angelslim_core import compress, load
from angelslim_core.cli.main import cli, main
from angelslim_core.errors import ModelError, PlanError, RecipeError
from angelslim_core.hookspecs import hookimpl
from angelslim_core.loading import load_model
from angelslim_core.pipeline import prepare
from angelslim_core.plugins import PluginHost
from angelslim_core.testing.conformance import check_plugin
from angelslim_core.validation import validate
from angelslim_mmprune import attach, attachment, make_strategy
from angelslim_mmprune.passes import PASSES, pass_of
from angelslim_mmprune.plan import Plan
from angelslim_mmprune.scorer import Scorer, load_scorer, save_scorer
from angelslim_mmprune.strategies import CLASSES
from angelslim_mmprune.strategies.base import Strategy

MEDIA = 255
MODELS = ["llava", "qwen2_5_vl", "qwen3_vl", "qwen2_audio"]


def prompt(architecture):
    """Inputs of the tiny models: eight tokens of text around an image or clip of 4 tokens, or 10."""
    generator = torch.Generator().manual_seed(0)
    count = 10 if architecture == "qwen2_audio" else 4
    ids = torch.tensor([[5, 6, 7, 253, *[MEDIA] * count, 8, 9, 10, 11]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if architecture == "llava":
        return inputs | {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator).bfloat16()}
    if architecture == "qwen2_audio":
        features = torch.randn(1, 16, 40, generator=generator).bfloat16()
        return inputs | {"input_features": features, "feature_attention_mask": torch.ones(1, 40, dtype=torch.int64)}
    patches = torch.randn(16, 3 * 2 * 14 * 14, generator=generator).bfloat16()
    return inputs | {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == MEDIA).int()}


def step(name="random", **options):
    return {"use": f"mmprune.{name}", "with": {"keep_ratio": 0.5, **options}}


@pytest.fixture(scope="module")
def artifact(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "out"
    compress(tiny("llava"), out=out, recipe={"steps": [{"use": "quant.int8_dynamic"}, step()]})
    return out


def test_every_strategy_is_a_pass():
    host = check_plugin("mmprune", angelslim_mmprune.plugin)
    assert [*host.registry.passes] == [f"mmprune.{name}" for name in CLASSES] and len(PASSES) == len(CLASSES)
    assert all(name == pass_.name == pass_.Config.name for name, pass_ in zip(CLASSES, PASSES, strict=True))


@pytest.mark.parametrize("architecture", MODELS)
def test_a_quantized_model_drops_tokens(tiny, tmp_path, architecture):
    model, out, inputs = tiny(architecture), tmp_path / "o", prompt(architecture)
    compress(model, out=out, recipe={"steps": [{"use": "quant.int8_dynamic"}, step(seed=3)]})
    found = validate(out, model, run=True)
    assert found["ok"], found["problems"]
    loaded, _ = load(out, "cpu")
    coupling = attachment(loaded)
    with torch.no_grad():
        pruned = loaded(**inputs).logits
        written = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
    (applied,) = coupling.last
    before = inputs["input_ids"].shape[1]
    assert (applied.before, applied.after) == ((before,), (before - (before - 8) // 2,)) and pruned.shape[1] == applied.after[0]
    assert written.shape[1] == before + 4
    coupling.remove()
    assert attachment(loaded) is None
    with torch.no_grad():
        assert loaded(**inputs).logits.shape[1] == before
        with attach(loaded, make_strategy("random", keep_ratio=0.5, seed=3)):
            assert torch.equal(loaded(**inputs).logits, pruned)


OPTIONS = {"hiprune": {"object_layer": 0}, "fastv": {"layer": 0}, "dart": {"layer": 0}}


@pytest.mark.parametrize("pass_", PASSES, ids=lambda p: p.name)
def test_every_strategy_runs_from_an_artifact(pass_, tiny, tmp_path):
    architecture = "llava" if "vision" in pass_.Config.modalities else "qwen2_audio"
    options = dict(OPTIONS.get(pass_.name, {}))
    if "scorer" in pass_.Config.model_fields:
        save_scorer(Scorer(64, 8), tmp_path / "trained")
        options["scorer"] = str(tmp_path / "trained")
    compress(tiny(architecture), out=tmp_path / "o", recipe={"steps": [step(pass_.name, **options)]})
    model, inputs = load(tmp_path / "o", "cpu")[0], prompt(architecture)
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    before = inputs["input_ids"].shape[1]
    assert written.shape[1] == before + 3 and attachment(model).last[-1].after == (before - (before - 8) // 2,)


def test_text_alone_is_read_as_before(artifact):
    loaded, _ = load(artifact, "cpu")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        said = loaded(ids).logits
        attachment(loaded).remove()
        assert torch.equal(said, loaded(ids).logits)


def test_presets_on_the_command_line(tiny, tmp_path):
    out = tmp_path / "o"
    result = CliRunner().invoke(cli, ["run", "--plugins", "mmprune,quant", "--model", str(tiny("llava")), "--out", str(out), "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert [p["id"] for p in json.loads(result.stdout)["passes"]] == [angelslim_mmprune.plugin.angelslim_default_steps(None)[0]["use"], "quant.int8_dynamic"]
    assert attachment(load(out, "cpu")[0]) is not None


def test_the_preset_is_idpruner_where_the_model_has_a_scorer(tmp_path):
    host = PluginHost()
    host.load(["mmprune"])
    assert host.default_steps(["mmprune"], "cpu", tmp_path) == host.default_steps(["mmprune"], "cpu") == [{"use": "mmprune.divprune"}]
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer/config.json").write_text("{}")
    assert host.default_steps(["mmprune"], "cpu", tmp_path) == [{"use": "mmprune.idpruner", "with": {"scorer": str(tmp_path / "scorer")}}]


@pytest.mark.parametrize(
    ("architecture", "steps", "error", "says"),
    [
        ("llama", [step()], PlanError, "mmprune.random: LlamaConfig: no media"), ("gemma3", [step()], PlanError, "no media are known"),
        ("llava", [step(keep_ratio=0)], RecipeError, "keep_ratio"), ("llava", [step(keep_tokens=3)], RecipeError, "contradict"),
        ("llava", [step(speed=3)], RecipeError, "speed"), ("llava", [step(), step()], PlanError, "exclude"),
        ("llava", [{**step(), "targets": ["attention"]}], PlanError, "as a whole"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_ends_it_before_work_starts(tiny, tmp_path, architecture, steps, error, says):
    with pytest.raises(error, match=says):
        compress(tiny(architecture), out=tmp_path / "o", recipe={"steps": steps})
    assert not list(tmp_path.iterdir())


class Late(Strategy):
    """Keep the first tokens behind a layer, by a file."""

    name = "late"
    layer: int = Field(0, description="behind it")
    weights: Path | None = Field(None, description="of a scorer")

    @property
    def stages(self):
        return (type(super().stages[0])(self.layer),)

    def plan(self, pool, keep: Sequence[int]) -> Plan:
        assert load_scorer(self.weights).in_features == pool.features.shape[2]
        return Plan.of([torch.arange(k) for k in keep])


@pytest.fixture
def host():
    """A plugin of this name with a strategy that has a layer and files."""
    module = ModuleType("late")
    module.ANGELSLIM_HOOKS = 1
    module.angelslim_register_passes = hookimpl(lambda: [pass_of(Late)])
    module.angelslim_modify_plan = angelslim_mmprune.plugin.angelslim_modify_plan
    found = PluginHost()
    found.register_module("mmprune", module)
    return found


@pytest.fixture
def weights(tmp_path):
    save_scorer(Scorer(64, 8), tmp_path / "weights")
    (tmp_path / "weights/modeling.py").write_text("raise SystemExit")
    return tmp_path / "weights"


def test_files_travel_in_the_artifact(tiny, tmp_path, host, weights):
    out = tmp_path / "o"
    compress(tiny("llava"), out=out, recipe={"steps": [step("late", weights=str(weights))]}, plugins=["mmprune"], host=host)
    shutil.rmtree(weights)
    assert json.loads((out / "angelslim/runtime.json").read_text())["policies"][0]["policy"]["weights"] == "weights"
    assert sorted(p.name for p in (out / "mmprune/weights").iterdir()) == ["config.json", "model.safetensors"]
    assert (
        "mmprune/weights/model.safetensors" in (out / "angelslim/SHA256SUMS").read_text() and str(tmp_path) not in (out / "angelslim/recipe.yaml").read_text()
    )
    model = load_model(out, "cpu", host=host).model
    with torch.no_grad():
        model(**prompt("llava"))
    assert attachment(model).last[0].pools[0].kept.tolist() == [0, 1]


def test_layers_and_files_are_looked_for_before_work_starts(tiny, tmp_path, host, weights):
    save_scorer(Scorer(96, 8), tmp_path / "wide")
    for options, says in (
        ({"layer": 7}, "layer 7 of 2"),
        ({"layer": 1}, "nothing comes behind"),
        ({"weights": str(tmp_path)}, "has no config.json"),
        ({"weights": str(tmp_path / "wide")}, "tokens of 96"),
    ):
        with pytest.raises(PlanError, match=says):
            prepare(tiny("llava"), recipe={"steps": [step("late", **{"weights": str(weights), **options})]}, plugins=["mmprune"], host=host)
    assert "model" not in [p.name for p in tmp_path.iterdir()]


@pytest.mark.parametrize("given", ["../x", "/etc", ".", "", "link", "nowhere", 3, [], "a\0b"], ids=repr)
def test_hostile_names_of_files(tiny, tmp_path, host, weights, given):
    out = tmp_path / "o"
    compress(tiny("llava"), out=out, recipe={"steps": [step("late", weights=str(weights))]}, plugins=["mmprune"], host=host)
    shutil.copytree(weights, out / "x")
    (out / "mmprune/link").symlink_to(weights)
    policy = {"keep_ratio": 0.5, "weights": given}
    (out / "angelslim/runtime.json").write_text(json.dumps({"policies": [{"pass": "mmprune.late", "policy": policy}]}))
    with pytest.raises(ModelError, match="no folder under mmprune/") as caught:
        load_model(out, "cpu", host=host)
    assert caught.value.where == "runtime.json: mmprune.late.weights"
    with pytest.raises(ModelError, match="lie in an artifact"):
        pass_of(Late).install(torch.nn.Module(), policy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_hostile_scorers(tiny, tmp_path, host, weights, name):
    out = tmp_path / "o"
    compress(tiny("llava"), out=out, recipe={"steps": [step("late", weights=str(weights))]}, plugins=["mmprune"], host=host)
    inside = out / "mmprune/weights" / name
    kept = inside.read_bytes()
    for content in (b"", b"{}", kept[:-3], kept[:40] + b"9" + kept[40:]):
        inside.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            load_model(out, "cpu", host=host)
        assert "\n" not in str(caught.value)
    inside.unlink()
    inside.symlink_to(weights / name)
    with pytest.raises(ModelError):
        load_model(out, "cpu", host=host)


GOOD = {"keep_ratio": 0.5}


@pytest.mark.parametrize(
    "policy",
    [
        {"keep_ratio": 2}, {"keep_ratio": "x" * 9999}, {"keep_ratio": True}, {"keep_ratio": float("inf")}, {"keep_tokens": 10**400}, {**GOOD, "keep_tokens": 3}, {**GOOD, "name": "scope"},
        {**GOOD, "plan": 1}, {**GOOD, "budget_scope": "__class__"}, {**GOOD, "seed": -1}, {**GOOD, "seed": 2**64}, {**GOOD, "needs": []}, [1], "text",
    ],
    ids=lambda policy: str(policy)[:60],
)  # fmt: skip
def test_hostile_policies_are_an_error_of_one_line(artifact, tmp_path, policy, capsys):
    out = shutil.copytree(artifact, tmp_path / "out")
    (out / "angelslim/runtime.json").write_text(json.dumps({"policies": [{"pass": "mmprune.random", "policy": policy}]}))
    with pytest.raises(ModelError) as caught:
        load(out, "cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1300
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(out), "--prompt", "a", "--max-new-tokens", "1"])
    said = capsys.readouterr().err
    assert ended.value.code == 5 and said.startswith("error[AS-MOD") and "Traceback" not in said


def test_two_policies_and_models_without_media(artifact, tiny, tmp_path):
    out = shutil.copytree(artifact, tmp_path / "out")
    record = {"policies": [{"pass": "mmprune.random", "policy": GOOD}] * 2}
    (out / "angelslim/runtime.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="already"):
        load(out, "cpu")
    text = shutil.copytree(tiny("llama"), tmp_path / "text")
    (text / "angelslim").mkdir()
    (text / "angelslim/runtime.json").write_text(json.dumps({"policies": record["policies"][:1]}))
    with pytest.raises(ModelError, match="no media are known"):
        load(text, "cpu")
