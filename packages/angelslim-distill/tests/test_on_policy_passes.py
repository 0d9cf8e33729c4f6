"""`distill.on_policy` and `distill.blockwise` as steps of a recipe."""

import json
from types import SimpleNamespace

import pytest
import torch

from angelslim_core import PluginHost, TrainedPass, compress, hookimpl, load
from angelslim_core.calibration.data import Samples
from angelslim_core.context import Context
from angelslim_core.errors import AngelslimError, NumericError, PlanError, RecipeError
from angelslim_core.io.checkpoint import Checkpoint
from angelslim_core.loading import load_model
from angelslim_core.pipeline import prepare
from angelslim_core.source import describe_source, open_source
from angelslim_core.testing.training import INT3, Int3Along, chats, rounded
from angelslim_distill.passes.blockwise import Blockwise
from angelslim_distill.passes.on_policy import OnPolicy

OPTIONS = {"steps": 10, "batch": 4, "length": 64, "held_out": 0.2, "every": 5, "lr": 3e-3, "warmup": 0.1, "max_new_tokens": 8}


class Rounding(TrainedPass):
    """Three bits, trained."""

    id = "toy.int3"
    claims = frozenset({"linear.weight"})

    def scheme(self, site):
        return INT3

    def quantizer(self, site, weight_OI):
        return Int3Along(weight_OI)


@hookimpl
def angelslim_register_passes():
    return [Rounding]


def beside():
    """What lets a recipe name the toy step."""
    host = PluginHost()
    host.register_module("toy", SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes))
    return {"plugins": ["toy", "distill"], "host": host}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def context_of(folder, workdir, **given):
    found = PluginHost()
    source = open_source(folder, found.registry.exporters.values())
    return Context(source, describe_source(source, found.registry.layouts), "cpu", 0, workdir, **given)


def steps(given, *before, **options):
    return {"steps": [*({"use": use} for use in before), {"use": "distill.on_policy", "with": {**OPTIONS, "data": str(given), **options}}]}


def test_a_student_learns_on_its_own_answers(tiny, data, tmp_path):
    student, teacher = tiny("llama", dtype="float32"), tiny("llama", dtype="float32", seed=1, num_hidden_layers=1)
    result = compress(student, recipe=steps(data, teacher=str(teacher), lmbda=1.0), out=tmp_path / "out")
    found = result.passes[0]["metrics"]
    assert found["kl"] < 0.95 * found["kl_before"] and json.dumps(found)
    assert not torch.equal(load(student)[0].lm_head.weight, load(tmp_path / "out")[0].lm_head.weight)


def test_without_own_answers_it_is_distill_logits(tiny, data, tmp_path):
    student, teacher = tiny("llama"), str(tiny("llama", seed=1))
    compress(student, recipe=steps(data, teacher=teacher, lmbda=0.0), out=tmp_path / "mixed")
    given = {k: v for k, v in OPTIONS.items() if k != "max_new_tokens"}
    compress(
        student, recipe={"steps": [{"use": "distill.logits", "with": {**given, "data": str(data), "teacher": teacher, "kind": "jsd"}}]}, out=tmp_path / "plain"
    )
    mixed, plain = (Checkpoint.open(tmp_path / out) for out in ("mixed", "plain"))
    assert all(torch.equal(mixed.read(name), plain.read(name)) for name in plain.tensors)


def test_prompts_may_be_those_of_another_file_and_must_leave_room(tiny, data, tmp_path):
    folder, prompts = tiny("llama", dtype="float32"), tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "ab cd"}\n{"prompt": "' + "efg " * 90 + '"}\n')
    model = load_model(folder, "cpu", emulate=False).model
    given = {**OPTIONS, "data": data, "teacher": folder, "prompts": prompts, "lmbda": 1.0, "batch": 1, "steps": 1, "count": "all"}
    context = context_of(folder, tmp_path / "work")
    OnPolicy(OnPolicy.Config.model_validate(given)).run(model, context)
    assert any("1 of 2 prompts are left out" in line for line in context.warnings)
    prompts.write_text('{"prompt": "' + "efg " * 90 + '"}\n')
    with pytest.raises(RecipeError, match="none of 1 prompts leaves room"):
        OnPolicy(OnPolicy.Config.model_validate(given)).run(model, context_of(folder, tmp_path / "other"))


def test_a_training_that_diverges_ends_with_its_loss_not_in_sampling(tiny, data, tmp_path):
    teacher = str(tiny("llama", dtype="float32", seed=1))
    with pytest.raises(NumericError, match="not finite"):
        compress(tiny("llama", dtype="float32"), recipe=steps(data, teacher=teacher, lmbda=1.0, weight_decay=1e38), out=tmp_path / "out")
    assert list(tmp_path.glob(".out.angelslim/measured/*/best-*"))


def test_of_several_turns_the_first_is_answered(tiny, data, tmp_path):
    folder, found = tiny("llama"), []
    for row in ('{"turns": ["ab cd", "efg"]}', '{"prompt": "ab cd"}'):
        (tmp_path / "p.jsonl").write_text(row + "\n")
        given = {**OPTIONS, "data": data, "prompts": tmp_path / "p.jsonl"}
        found.append(OnPolicy(OnPolicy.Config.model_validate(given))._prompts(None, context_of(folder, tmp_path)))
    assert found[0] == found[1] and len(found[0]) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"teacher": None}, "there is no teacher"),
        ({"count": "all"}, "nothing is a prompt"),
        ({"max_new_tokens": 64}, "leave none of 64"),
        ({"prompts": "none.jsonl"}, "is no file"),
        ({"shard": True}, "samples no answers"),
        ({"compile": True}, "of all lengths"),
        ({"lmbda": 1.5}, "lmbda"),
        ({"top_p": 0}, "top_p"),
    ],
    ids=lambda value: str(value),
)
def test_what_does_not_fit_is_refused_before_any_work(options, why, tiny, data):
    with pytest.raises(AngelslimError, match=why):
        prepare(tiny("llama"), recipe=steps(data, **{"teacher": str(tiny("llama", seed=1)), **options}), **beside())


def test_no_cache_holds_what_the_model_has_yet_to_say(tiny, data, tmp_path):
    (tmp_path / "cache").mkdir()
    with pytest.raises(PlanError, match="yet to say"):
        prepare(tiny("llama"), recipe=steps(data, teacher=str(tiny("llama", seed=1)), cache=str(tmp_path / "cache")))
    with pytest.raises(PlanError, match="manifest"):  # it is looked at
        prepare(tiny("llama"), recipe=steps(data, teacher=str(tiny("llama", seed=1)), cache=str(tmp_path / "cache"), lmbda=0.0, kind="kl"))


def test_a_model_that_rounds_learns_on_its_own_answers_from_itself(tiny, data, tmp_path):
    folder = tiny("llama", dtype="float32")
    model = load_model(folder, "cpu", emulate=False).model
    rounded(model, Int3Along)
    given = {**OPTIONS, "data": data, "quantizer_lr": 1e-2, "steps": 20}
    found = OnPolicy(OnPolicy.Config.model_validate(given)).run(model, context_of(folder, tmp_path))
    assert found["kl"] < 0.95 * found["kl_before"]
    assert prepare(folder, recipe=steps(data, "toy.int3"), **beside())  # its unrounded self is its teacher


def test_a_head_that_rounds_is_refused_before_any_work(tiny, data):
    given = steps(data, "toy.int3")
    given["steps"][0]["targets"] = ["lm_head", "mlp"]
    with pytest.raises(PlanError, match="rounds the head"):
        prepare(tiny("llama"), recipe=given, **beside())


def test_block_by_block_is_a_step_after_one_that_says_how_linears_round(tiny, tmp_path):
    folder = tiny("llama", dtype="float32")
    text = tmp_path / "t.txt"
    text.write_text("ab cd efg h " * 80)
    calibration = {"data": str(text), "samples": 6, "tokens": 32, "batch_size": 2}
    alone = {"steps": [{"use": "distill.blockwise"}], "calibration": calibration}
    with pytest.raises(PlanError, match="no step before it says how"):
        prepare(folder, recipe=alone, **beside())
    step = {"use": "distill.blockwise", "with": {"epochs": 4, "batch": 2, "lr": 1e-3, "quantizer_lr": 1e-3, "held_out": 0.0}}
    recipe = {"steps": [{"use": "toy.int3"}, step], "calibration": calibration}
    result = compress(folder, recipe=recipe, out=tmp_path / "out", **beside())
    found = result.passes[1]["metrics"]
    assert (
        len(found["errors"]) == 2
        and all(e < s for s, e in zip(found["start_errors"], found["errors"], strict=True))
        and found["last_error"] == found["errors"][1]
    )
    model, _ = load(tmp_path / "out")
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_after_blocks_were_trained_the_teacher_is_still_the_model_that_training_began_with(tiny, data, tmp_path):
    folder = tiny("llama", dtype="float32")
    blocks = {"use": "distill.blockwise", "with": {"epochs": 4, "batch": 2, "lr": 1e-3, "quantizer_lr": 1e-3, "held_out": 0.0}}
    end = {"use": "distill.qad", "with": {k: v for k, v in OPTIONS.items() if k != "max_new_tokens"} | {"data": str(data), "steps": 1}}
    calibration = {"data": str(data), "samples": 6, "tokens": 32}
    alone = compress(folder, recipe={"steps": [{"use": "toy.int3"}, end]}, out=tmp_path / "alone", **beside())
    after = compress(folder, recipe={"steps": [{"use": "toy.int3"}, blocks, end], "calibration": calibration}, out=tmp_path / "after", **beside())
    start = after.passes[1]["metrics"]
    assert start["last_error"] < start["last_start_error"], "weights have moved"
    taught = [result.passes[-1]["metrics"]["teacher_perplexity"] for result in (alone, after)]
    assert taught[0] == pytest.approx(taught[1], rel=1e-6)
    first = {"use": "distill.logits", "with": {**end["with"], "teacher": str(folder)}}
    with pytest.raises(PlanError, match="no longer there"):
        prepare(folder, recipe={"steps": [first, {"use": "toy.int3"}, blocks, end], "calibration": calibration}, **beside())


def test_blocks_need_samples(tiny, tmp_path):
    with pytest.raises(AngelslimError, match="calibration"):
        prepare(tiny("llama"), recipe={"steps": [{"use": "toy.int3"}, {"use": "distill.blockwise"}]}, **beside())
    model, context = load_model(tiny("llama"), "cpu").model, context_of(tiny("llama"), tmp_path, samples=Samples([[5, 6, 7]]))
    with pytest.raises(RecipeError, match="no linear of the model's blocks rounds"):
        Blockwise().run(model, context)
