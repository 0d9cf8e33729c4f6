"""`distill.logits` and `distill.qad` as steps of a recipe."""

import json

import pytest
import torch

from angelslim_core import compress, load
from angelslim_core.context import Context
from angelslim_core.errors import AngelslimError, PlanError, RecipeError, StoppedError
from angelslim_core.fake_quant import placed
from angelslim_core.io.checkpoint import Checkpoint, read_header
from angelslim_core.loading import load_model
from angelslim_core.pipeline import prepare
from angelslim_core.plugins import PluginHost
from angelslim_core.source import describe_source, open_source
from angelslim_core.testing.training import Int3, Int3Along, chats, rounded
from angelslim_distill.cache.making import CacheOptions, make_cache
from angelslim_distill.parameters import choose_parameters
from angelslim_distill.passes.qad import Qad

OPTIONS = {"steps": 20, "batch": 4, "length": 64, "held_out": 0.2, "every": 5, "lr": 3e-3, "warmup": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def recipe(given, use="distill.logits", **options):
    return {"steps": [{"use": use, "with": {**OPTIONS, "data": str(given), **options}}]}


def context_of(folder, workdir, **given):
    host = PluginHost()
    source = open_source(folder, host.registry.exporters.values())
    return Context(source, describe_source(source, host.registry.layouts), "cpu", 0, workdir, **given)


def test_a_student_is_trained_towards_another_model(tiny, data, tmp_path):
    student, teacher = tiny("llama", dtype="float32"), tiny("llama", dtype="float32", seed=1, num_hidden_layers=1)
    result = compress(student, recipe=recipe(data, teacher=str(teacher)), out=tmp_path / "out")
    (entry,) = result.passes
    found = entry["metrics"]
    assert found["kl"] < 0.9 * found["kl_before"] and found["documents"] == 40 and found["trained"] == sum(p.numel() for p in load(student)[0].parameters())
    assert [curve["title"] for curve in found["curves"]] == ["Training loss", "KL to the teacher on held-out rows"] and json.dumps(found)
    before, after = load(student)[0], load(tmp_path / "out")[0]
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_a_stopped_run_goes_on_to_the_same_model(tiny, data, tmp_path):
    student, teacher = tiny("llama"), str(tiny("llama", seed=1))
    asked = iter([False] * 7 + [True] * 1000)
    with pytest.raises(StoppedError):
        compress(student, recipe=recipe(data, teacher=teacher), out=tmp_path / "cut", stop_requested=lambda: next(asked))
    for out in ("cut", "whole"):
        compress(student, recipe=recipe(data, teacher=teacher), out=tmp_path / out)
    cut, whole = (Checkpoint.open(tmp_path / out) for out in ("cut", "whole"))
    assert all(torch.equal(cut.read(name), whole.read(name)) for name in whole.tensors)


def test_compiled_layers_and_the_padding_that_they_need_change_no_step(tiny, data, tmp_path, monkeypatch):
    found = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: found({"inductor": "aot_eager"}.get(name, name)))
    student, teacher = tiny("llama", dtype="float32"), tiny("llama", dtype="float32", seed=1)
    left = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        metrics = compress(student, recipe=recipe(data, teacher=str(teacher), steps=6, compile=compiled, length=70), out=out).passes[0]["metrics"]
        assert (metrics["way"], metrics["graphs"]) == (("compiled layers", 2) if compiled else ("plain", 0))
        left.append((metrics["kl"], metrics["trained_tokens"], load(out)[0]))
    assert left[0][:2] == (pytest.approx(left[1][0], rel=1e-4), left[1][1])
    for one, other in zip(left[0][2].parameters(), left[1][2].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_recipe_may_train_twice(tiny, data, tmp_path):
    teacher = str(tiny("llama", dtype="float32", seed=1))
    step = recipe(data, teacher=teacher, held_out=0.0, steps=3)["steps"][0]
    result = compress(tiny("llama", dtype="float32"), recipe={"steps": [step, step]}, out=tmp_path / "out")
    first, second = (entry["metrics"]["curves"][0]["points"] for entry in result.passes)
    assert second[0][1] < first[0][1], "the second goes on with what the first left"


def test_quantizers_are_trained_towards_the_model_without_them(tiny, data, tmp_path):
    folder = tiny("llama", dtype="float32")
    model = load_model(folder, "cpu", emulate=False).model
    rounded(model, Int3Along)
    said = []
    pass_ = Qad(Qad.Config.model_validate({**OPTIONS, "data": data, "quantizer_lr": 1e-2}))
    found = pass_.run(model, context_of(folder, tmp_path, progress=lambda done, total, label: said.append((done, total, label))))
    assert found["kl"] < 0.7 * found["kl_before"] and len(placed(model)) == 14 and not any(p.requires_grad for p in model.parameters())
    assert said[-1][:2] == (20, 20) and "loss" in said[0][2]
    assert found["trained"] == sum(m.weight.numel() + m.quantizer.scale.numel() for m in placed(model).values())


def test_matrices_may_be_muons_and_norms_trained_along(tiny, data, tmp_path):
    folder = tiny("llama", dtype="float32")
    model = load_model(folder, "cpu", emulate=False).model
    rounded(model, Int3Along)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pass_ = Qad(Qad.Config.model_validate({**OPTIONS, "data": data, "quantizer_lr": 1e-2, "optimizer": "muon", "also": ["norm"]}))
    found = pass_.run(model, context_of(folder, tmp_path))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert found["kl"] < 0.7 * found["kl_before"]
    assert moved == {name for name in before if "norm" in name or "proj" in name}
    kept = read_header(next((tmp_path / "measured").glob("*/step-*")) / "state.safetensors")
    muons = {name.removesuffix(".momentum_buffer") for name in kept if name.endswith(".momentum_buffer")}
    assert muons == {name for name in before if name.endswith("proj.weight")}


def test_what_is_to_be_trained_along_must_be_there(tiny, data, tmp_path):
    model = load_model(tiny("llama"), "cpu", emulate=False).model
    rounded(model, Int3Along)
    with pytest.raises(RecipeError, match="'nrom' in its name"):
        choose_parameters(model, "auto", ("norm", "nrom"))
    rounded(frozen := load_model(tiny("llama"), "cpu", emulate=False).model, Int3)
    with pytest.raises(RecipeError, match=r"'proj\.weight' in its name"):  # its quantizers say that they are frozen
        choose_parameters(frozen, "auto", ("proj.weight",))


@pytest.mark.parametrize("given", [{}, {"checkpointing": True}], ids=str)
def test_rows_are_padded_for_compiled_layers_only_where_these_can_be(tiny, data, tmp_path, monkeypatch, given):
    folder, widths = tiny("llama"), []
    rounded(model := load_model(folder, "cpu", emulate=False).model, Int3Along)
    monkeypatch.setattr(Qad, "is_compiled", lambda *_: "auto")
    source = Qad.source
    monkeypatch.setattr(Qad, "source", lambda *args: (widths.append(args[-1]), source(*args))[1])
    Qad(Qad.Config.model_validate({**OPTIONS, "data": data, "steps": 1, **given})).run(model, context_of(folder, tmp_path))
    assert (widths[0] == 1) == bool(given)


def test_muon_needs_matrices_that_are_trained(tiny, data, tmp_path):
    folder = tiny("llama")
    for train, quantizer in (("quantizers", Int3Along), ("auto", Int3)):
        rounded(model := load_model(folder, "cpu", emulate=False).model, quantizer)
        pass_ = Qad(Qad.Config.model_validate({**OPTIONS, "data": data, "optimizer": "muon", "train": train, "also": ["norm", "embed"]}))
        with pytest.raises(RecipeError, match="none of them is trained"):
            pass_.run(model, context_of(folder, tmp_path))
    with pytest.raises(ValueError, match="at least 1 character"):
        Qad.Config.model_validate({"data": data, "also": [""]})


def test_quantization_aware_distillation_needs_linears_that_round(tiny, data, tmp_path):
    folder = tiny("llama")
    with pytest.raises(PlanError, match="no step before it says how"):
        prepare(folder, recipe=recipe(data, "distill.qad"))
    with pytest.raises(PlanError, match="none of the model's does"):
        Qad(Qad.Config.model_validate({**OPTIONS, "data": data})).run(load_model(folder, "cpu").model, context_of(folder, tmp_path))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"data": "none.jsonl"}, "does not exist"),
        ({"kd_weight": 0}, "nothing is trained for"),
        ({"kind": "mse", "top_k": 5}, "compares logits"),
        ({"kind": "mse", "cache": "none"}, "compares logits"),
        ({"cache": "none"}, "is no folder"),
        ({"teacher": None}, "teacher"),
        ({"kind": "ukl"}, "kind"),
        ({"compile": True, "shard": True}, "together with shard"),
        ({"optimizer": "muon", "shard": True}, "lie in parts"),
        ({"compile": True, "checkpointing": True}, "together with checkpointing"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(tiny, data, options, why):
    with pytest.raises((PlanError, RecipeError), match=why) as caught:
        prepare(tiny("llama"), recipe=recipe(data, **{"teacher": str(tiny("llama", seed=1)), **options}))
    assert caught.value.exit_code == 3


def test_a_text_that_no_tensor_has_in_its_name_is_in_the_plan(tiny, data):
    given = {"teacher": str(tiny("llama", seed=1)), "also": ["norm", "nrom"]}
    (line,) = prepare(tiny("llama"), recipe=recipe(data, **given)).plan.warnings
    assert "steps[0].with.also: no tensor of the checkpoint has 'nrom'" in line


def test_text_has_no_answers_which_is_said_before_any_work(tiny, data, tmp_path):
    (tmp_path / "t.txt").write_text("ab cd " * 400)
    given = {"teacher": str(tiny("llama", seed=1))}
    with pytest.raises(PlanError, match="nothing is an answer"):
        prepare(tiny("llama"), recipe=recipe(tmp_path / "t.txt", **given))
    assert prepare(tiny("llama"), recipe=recipe(tmp_path / "t.txt", count="all", **given))


def test_a_training_that_leaves_its_start_says_so(tiny, data, tmp_path):
    folder = tiny("llama", dtype="float32")
    given = {"teacher": str(folder), "steps": 2, "every": 1}  # nothing is nearer to itself
    result = compress(folder, recipe=recipe(data, **given), out=tmp_path / "best")
    assert any("its start is what is kept" in line for line in result.warnings) and result.passes[0]["metrics"]["step"] == 0
    assert not compress(folder, recipe=recipe(data, keep="last", **given), out=tmp_path / "last").warnings


def test_a_teacher_of_another_tokenizer_or_none_is_refused_before_any_work(tiny, tiny_copy, data):
    for teacher in (tiny("llama", tokenizer=False), data.parent / "none"):
        with pytest.raises(AngelslimError, match="no tokenizer"):
            prepare(tiny("llama"), recipe=recipe(data, teacher=str(teacher)))
    with pytest.raises(PlanError, match="has no tokenizer"):
        prepare(tiny("llama", tokenizer=False), recipe=recipe(data, teacher=str(tiny("llama"))))


def test_rows_are_not_shared_where_layers_carry_a_state(tiny, data, tmp_path):
    folder = tiny("qwen3_next", dtype="float32")
    result = compress(folder, recipe=recipe(data, teacher=str(folder), steps=1, every=1), out=tmp_path / "out")
    assert any("do not share rows" in line for line in result.warnings) and result.passes[0]["metrics"]["rows"] == 32


def test_a_cache_that_does_not_fit_is_refused_before_any_work(tiny, data, tmp_path):
    student, teacher = tiny("llama", dtype="float32"), tiny("llama", dtype="float32", seed=1)
    made = make_cache(teacher, data, tmp_path / "c", CacheOptions(top_k=4, length=64, held_out=0.2), "cpu")
    assert made.rows and prepare(student, recipe=recipe(data, teacher=str(teacher), cache=str(tmp_path / "c")))
    for options, why in (({"teacher": str(student)}, "another teacher"), ({"top_k": 5}, "keeps 4 tokens"), ({"cache": str(tmp_path)}, "manifest")):
        with pytest.raises(PlanError, match=why) as caught:
            prepare(student, recipe=recipe(data, **{"teacher": str(teacher), "cache": str(tmp_path / "c"), **options}))
        assert caught.value.exit_code == 3
