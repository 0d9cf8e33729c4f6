"""Recipes: strict YAML, positions in every error, overrides, schema."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from angelslim_core.errors import RecipeError
from angelslim_core.passes import PassConfig, TensorPass
from angelslim_core.recipe import bind_options, load_recipe, parse_size, recipe_schema, shipped, to_yaml
from angelslim_core.strict_yaml import parse


class Toy(TensorPass):
    """A pass with options."""

    id = "toy.round"

    class Config(PassConfig):
        bits: int = Field(4, ge=2, le=8, description="Bits.")

    def apply(self, weights, context):
        return weights


GOOD = "version: 1\nmodel: {path: ./m}\nsteps:\n  - use: toy.round\n    with:\n      bits: 4\n"


def failure(text, **options):
    with pytest.raises(RecipeError) as caught:
        load_text(text, **options)
    return caught.value


def load_text(text, **options):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(text)
        return load_recipe(path, **options)


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", "yes"), ("no", "no"), ("on", "on"), ("true", True), ("1e-4", 1e-4), ("1.5", 1.5), (".5", 0.5), ("012", "012"), ("0x1f", "0x1f"), ("1:30", "1:30"),
     ("2024-01-01", "2024-01-01"), ("~", None), ("", None), ("-3", -3), ("'true'", "true"), ("1_000", "1_000")],
)  # fmt: skip
def test_scalars_hold_no_surprise(text, value):
    assert parse(f"a: {text}", "r")[0] == {"a": value}


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("a: 1\na: 2", "r:2:1", "twice"),
        ("a: &x 1", "r:1:4", "anchors"),
        ("a: !!python/object:os.system x", "r:1:4", "tags"),
        ("a:\n  <<: {b: 1}", "r:2:3", "merge"),
        ("? [1]\n: 2", "r:1:3", "plain text"),
        ("a: 1\n---\nb: 2", "r", "more than one"),
        ("a: [1\nb: 2", "r:2:2", "not YAML"),
        ("[" * 3000, "r:1:33", "deeper"),
        ("a: " + "x" * (1 << 20), "r", "larger"),
        ("a: \x00", "r", "not YAML"),
    ],
)
def test_yaml_that_is_refused(text, where, says):
    with pytest.raises(RecipeError, match=says) as caught:
        parse(text, "r")
    assert caught.value.where == where


def test_positions_in_errors():
    error = failure(GOOD.replace("steps:", "stepps:"))
    assert error.where.startswith("r.yaml:3:1") and "steps" in error.hint
    error = failure(GOOD + "runtime: {seed: -1}\n")
    assert error.where.startswith("r.yaml:7:11 runtime.seed")
    error = failure(GOOD.replace("use: toy.round", "us: toy.round"))
    assert error.where.startswith("r.yaml:4")
    assert failure("version: 1\n").where.startswith("r.yaml") and "steps" in failure("version: 1\n").what


def test_options_are_bound_with_positions():
    recipe = load_text(GOOD.replace("bits: 4", "bits: 99"))
    with pytest.raises(RecipeError) as caught:
        bind_options(0, recipe, Toy)
    assert caught.value.where == "r.yaml:6:7 steps[0].with.bits" and "99" in caught.value.what
    recipe = load_text(GOOD.replace("bits: 4", "bit: 4"))
    with pytest.raises(RecipeError) as caught:
        bind_options(0, recipe, Toy)
    assert "did you mean bits" in caught.value.hint
    assert bind_options(0, load_text(GOOD), Toy).bits == 4


def test_overrides_win_and_are_located():
    recipe = load_text(GOOD, overrides=["steps[0].with.bits=99", "runtime.seed=3"])
    assert recipe.runtime.seed == 3
    with pytest.raises(RecipeError) as caught:
        bind_options(0, recipe, Toy)
    assert caught.value.where == "--set steps[0].with.bits=99"
    assert load_text(GOOD, overrides=["steps[0].targets=['mlp', q]"]).steps[0].targets == ["mlp", "q"]


@pytest.mark.parametrize("override", ["steps[1].with.bits=1", "steps.with=1", "a", "steps[0=1", "=1", "model.path.x=1", "version=[", "nothing.at.all=1"])
def test_overrides_that_make_no_sense(override):
    error = failure(GOOD, overrides=[override])
    assert "--set" in error.where


def test_paths_count_from_the_recipe(tmp_path):
    (tmp_path / "m").mkdir()
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: m}\ncalibration: {data: c.jsonl}\nsteps: [{use: toy.round}]\nexport: {to: out}\n")
    recipe = load_recipe(path)
    assert recipe.model.path == str(tmp_path / "m") and recipe.export.to == str(tmp_path / "out")
    assert recipe.calibration.data == str(tmp_path / "c.jsonl")
    assert load_recipe(path, overrides=["export.to=here"]).export.to == "here"
    path.write_text("model: {path: owner/name}\ncalibration: {data: self}\nsteps: [{use: toy.round}]\n")
    assert load_recipe(path).model.path == "owner/name" and load_recipe(path).calibration.data == "self"
    assert str(tmp_path) not in to_yaml(load_recipe(path))


def test_no_urls_and_gates_need_eval():
    assert "URL" in failure("model: {path: 'https://x/y'}\nsteps: [{use: a.b}]\n").what
    assert "eval" in failure("steps: [{use: a.b}]\ngates: {max_kl: 0.1}\n").what


def test_extends_shipped_recipes_only():
    recipe = load_text("extends: int4\nruntime: {seed: 5}\n")
    assert recipe.steps[0].use == "quant.int4_rtn" and recipe.runtime.seed == 5
    assert "no shipped recipe" in failure("extends: ../int4\n").what


def test_missing_file_suggests_a_shipped_one():
    with pytest.raises(RecipeError) as caught:
        load_recipe("int9")
    assert "int" in caught.value.hint


def test_shipped_recipes_load():
    assert {"int8", "fp8", "int4", "fp8_block", "fp8_static"} <= shipped().keys()
    for name in shipped():
        assert load_recipe(name).steps


def test_two_bits_rotated_are_two_bits_but_for_the_rotation():
    plain, rotated = (load_recipe(name).steps for name in ("two_bit", "two_bit_rotated"))
    assert rotated[0].use == "quant.rotate" and rotated[1:] == plain


def test_schema_knows_the_options():
    schema = recipe_schema([Toy])
    assert schema["type"] == "object" and json.dumps(schema)
    (step,) = schema["properties"]["steps"]["items"]["anyOf"]
    assert step["properties"]["use"]["const"] == "toy.round" and step["properties"]["with"]["properties"]["bits"]["maximum"] == 8


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("800 MB", 8 * 10**8), ("1.5k", 1500), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=60), st.tuples(st.integers(0, len(GOOD)), st.text(max_size=4)).map(lambda t: GOOD[: t[0]] + t[1] + GOOD[t[0] :])))
def test_any_text_is_a_recipe_or_an_error_of_ours(text):
    try:
        data, _ = parse(text, "r")
        load_recipe(data if isinstance(data, dict) else {})
    except RecipeError as error:
        assert error.where and "\n" not in error.code
