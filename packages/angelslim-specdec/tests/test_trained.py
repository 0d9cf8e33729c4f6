"""Recipes that train a draft: for the output as it is served, found again by `load`, refused where it cannot work."""

import json
import shutil

import pytest
import torch

from angelslim_core import PluginHost, compress, load, validate
from angelslim_core.errors import AngelslimError, ModelError, PlanError, RecipeError, StoppedError
from angelslim_core.loading import load_model
from angelslim_core.pipeline import prepare
from angelslim_specdec.folder import load_draft
from angelslim_specdec.passes import TRAINED, Ngram
from angelslim_specdec.passes.base import NAMES
from angelslim_specdec.registry import drafts
from angelslim_specdec.target import Target

SMALL = {"steps": 3, "draft_vocab": 64, "k": 3}
BLOCKS = {"num_hidden_layers": 1, "block_size": 4, "num_anchors": 8}
IDS = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [("what is it", "a thing of things"), ("why so", "because it was and is"), ("who", "nobody knows for sure")]
    rows = [{"id": str(i), "conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for i, (q, a) in enumerate(turns)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(chats, *before, use="specdec.eagle3", **options):
    return {"steps": [*({"use": name} for name in before), {"use": use, "with": {"data": str(chats), **SMALL, **options}}]}


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", dtype="float32")


@pytest.fixture(scope="module")
def made(model, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return out, compress(model, out=out, recipe=recipe(chats, "quant.int8_dynamic"))


def test_the_output_decodes_with_a_draft_of_its_own(made, model, chats):
    out, result = made
    loaded, _ = load(out, "cpu")
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **given), loaded.generate._own(IDS, **given))
    assert json.loads((out / "angelslim/runtime.json").read_text())["policies"] == [{"pass": "specdec.eagle3", "policy": {"draft": "draft", "k": 3}}]
    assert validate(out, model)["ok"] and "draft/model.safetensors" in (out / "angelslim/SHA256SUMS").read_text()
    report = result.passes[1]
    assert report["id"] == "specdec.eagle3" and report["metrics"]["steps"] == 3 and report["metrics"]["conversations"] == 3 and report["seconds"] > 0
    texts = [p.read_text() for p in (*out.rglob("*.json"), *out.rglob("*.yaml"), out / "README.md")]
    assert not any(str(chats.parent) in text or str(out.parent) in text for text in texts)
    assert not list(out.parent.glob(".*")) and sorted(p.name for p in (out / "draft").iterdir()) == ["config.json", "model.safetensors", "training.json"]


def test_features_are_those_of_the_compressed_model(made, model, chats, tmp_path, monkeypatch):
    seen = []
    plain = Target.features
    monkeypatch.setattr(Target, "features", lambda self, ids, *a: seen.append((ids, found := plain(self, ids, *a))) or found)
    compress(model, out=tmp_path / "o", recipe=recipe(chats, "quant.int8_dynamic"))
    ids, (_, final) = seen[0]
    served, dense = (Target(load_model(path, "cpu").model).features(ids, (0,))[1] for path in (made[0], model))
    row = final.shape[1]
    assert torch.equal(final[:, :1], served[:, :1]) and not torch.allclose(final[:, :1], dense[:, :1], atol=1e-4) and row
    again = [load_draft(path / "draft").state_dict() for path in (made[0], tmp_path / "o")]
    assert all(torch.equal(t, again[1][n]) for n, t in again[0].items()), "the same seed gives the same draft"


def test_it_stands_anywhere_in_the_recipe(made, model, chats, tmp_path):
    steps = recipe(chats, "quant.int8_dynamic")["steps"]
    compress(model, out=tmp_path / "o", recipe={"steps": steps[::-1]})
    first, second = (load_draft(path / "draft").state_dict() for path in (made[0], tmp_path / "o"))
    assert all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.mark.parametrize("kind", [k for k in TRAINED if k.draft != "eagle3"], ids=lambda k: k.draft)
def test_every_kind(kind, model, chats, tmp_path):
    settings = {} if kind.draft == "mtp" else BLOCKS
    compress(model, out=tmp_path / "o", recipe=recipe(chats, use=kind.id, settings=settings, draft_vocab=None, steps=1))
    loaded, _ = load(tmp_path / "o", "cpu")
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **given), loaded.generate._own(IDS, **given))


def test_passes_are_those_of_the_drafts_and_ngram_is_what_the_plugin_does_by_default(model):
    assert {k.draft for k in TRAINED} == drafts().keys() & set(NAMES) == set(NAMES) - {"ngram", "suffix"}
    assert [s.pass_.id for s in prepare(model, plugins=["specdec"]).plan.steps] == ["specdec.ngram"]
    host = PluginHost()
    host.load(["specdec"])
    assert {f"specdec.{n}" for n in NAMES} <= host.registry.passes.keys() and "specdec.eagle3" in Ngram.conflicts


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"data": "nowhere"}, RecipeError, "nowhere"), ({"draft_vocab": 300}, PlanError, "the model has 256"), ({"settings": {"speed": 3}}, PlanError, "speed"),
        ({"use": "specdec.dflash", "settings": BLOCKS, "k": 4}, PlanError, "3 tokens at most"), ({"k": 0}, RecipeError, "k"), ({"speed": 3}, RecipeError, "speed"),
        ({"settings": {"aux_hidden_state_layer_ids": [99]}}, PlanError, "99"),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_bad_options_end_it_before_work_starts(model, chats, tmp_path, options, error, what):
    with pytest.raises(error, match=what):
        compress(model, out=tmp_path / "o", recipe=recipe(chats, "quant.int8_dynamic", **options))
    assert not list(tmp_path.iterdir())


def test_what_it_cannot_stand_beside_is_refused(model, chats, tmp_path):
    with pytest.raises(PlanError, match=r"attention to all tokens, which sparseattn\.stem"):
        prepare(model, recipe=recipe(chats, "sparseattn.stem"))
    with pytest.raises(PlanError, match="attention to all tokens"):
        prepare(model, ["specdec.suffix", "sparseattn.a_shape"])
    steps = [{"use": "quant.int8_dynamic", "targets": ["head"]}, *recipe(chats)["steps"]]
    with pytest.raises(PlanError, match="lm_head would be quantized"):
        prepare(model, recipe={"steps": steps})
    with pytest.raises(PlanError, match="exclude each other"):
        prepare(model, recipe=recipe(chats, "specdec.ngram"))
    shutil.copytree(model, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no tokenizer"):
        prepare(tmp_path / "bare", recipe=recipe(chats))


@pytest.mark.parametrize("quantizer", ["quant.rotate", "quant.kv_fp8"])
def test_other_quantizers(quantizer, model, chats, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    given = recipe(chats, quantizer)
    if quantizer == "quant.kv_fp8":
        given["calibration"] = {"data": str(text), "samples": 2, "tokens": 16}
    compress(model, out=tmp_path / "o", recipe=given)
    loaded, _ = load(tmp_path / "o", "cpu")
    call = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **call), loaded.generate._own(IDS, **call))


def test_a_stopped_training_goes_on(made, model, chats, tmp_path):
    count = iter(range(1000))
    reached = []

    def progress(done, total, label):
        if "tok/s" in label:
            reached.append(next(count))

    given = recipe(chats, "quant.int8_dynamic")
    with pytest.raises(StoppedError):
        compress(model, out=tmp_path / "o", recipe=given, progress=progress, stop_requested=lambda: bool(reached))
    assert (tmp_path / ".o.angelslim/measured/.draft.angelslim/states").is_dir() and not (tmp_path / "o").exists()
    compress(model, out=tmp_path / "o", recipe=given)
    first, second = (load_draft(path / "draft").state_dict() for path in (made[0], tmp_path / "o"))
    assert all(torch.equal(t, second[n]) for n, t in first.items()) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        ({"draft": "../x", "k": 3}, "no folder in the artifact"), ({"draft": "/etc", "k": 3}, "no folder in the artifact"), ({"draft": ".", "k": 3}, "no folder"),
        ({"draft": "link", "k": 3}, "no folder in the artifact"), ({"draft": "nowhere", "k": 3}, "nowhere"), ({"draft": "draft"}, "Field required"),
        ({"draft": "draft", "k": 99}, "less than or equal"), ({"draft": "draft", "k": 3, "x": 1}, "not permitted"), ({"draft": 3, "k": 3}, "string"),
        ([], "valid dictionary"), ({"draft": "a\0b", "k": 3}, "no folder in the artifact"),
    ],
    ids=str,
)  # fmt: skip
def test_hostile_policies(made, tmp_path, policy, what):
    out = tmp_path / "o"
    shutil.copytree(made[0], out)
    shutil.copytree(out / "draft", tmp_path / "x")
    (out / "link").symlink_to(tmp_path / "x")
    (out / "angelslim/runtime.json").write_text(json.dumps({"policies": [{"pass": "specdec.eagle3", "policy": policy or [1]}]}))
    with pytest.raises(AngelslimError, match=what):
        load(out, "cpu")


def test_a_draft_of_another_model_or_kind_is_refused(made, tiny, tmp_path):
    with pytest.raises(ModelError, match="lies in an artifact"):
        TRAINED[0].install(torch.nn.Module(), {"draft": "draft", "k": 3})
    other = load_model(tiny("llama", dtype="float32", seed=5), "cpu").model
    with pytest.raises(ModelError, match="another target"):
        TRAINED[0].install_from(made[0], other, {"draft": "draft", "k": 3})
    with pytest.raises(ModelError, match="of kind eagle3"):
        TRAINED[-1].install_from(made[0], load_model(made[0], "cpu").model, {"draft": "draft", "k": 3})
