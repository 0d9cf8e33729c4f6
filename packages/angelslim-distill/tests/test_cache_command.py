"""A cache that the command writes is what a pass that reads the same file finds its rows in, and trains the student as its teacher would."""

import json

import pytest
import torch

from angelslim_core.cli.main import main
from angelslim_core.errors import ModelError
from angelslim_core.loading import load_model, load_tokenizer
from angelslim_core.training import TrainingOptions
from angelslim_distill.cache.reading import open_cache
from angelslim_distill.data.rows import Supervised, collate, prepare
from angelslim_distill.objective import Objective
from angelslim_distill.parameters import choose_parameters
from angelslim_distill.teacher import teacher_from
from angelslim_distill.trainer import DistillTraining, Looks


def cli(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["distill", *map(str, arguments)])
    return ended.value.code


@pytest.fixture(scope="module")
def folders(tiny):
    return tiny(dtype="float32"), tiny(dtype="float32", initializer_range=0.1)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "c.jsonl"
    words = ["ab", "cd", "efg", "h"]
    rows = [
        {"messages": [{"role": "user", "content": " ".join(words[: i % 4 + 1])}, {"role": "assistant", "content": words[i % 3] * (i % 5 + 2)}]}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


READ = {"length": 96, "held_out": 0.2, "seed": 0}


@pytest.fixture(scope="module")
def made(folders, chats, tmp_path_factory):
    def make(*more):
        out = tmp_path_factory.mktemp("cache") / "c"
        given = ("--model", folders[1], "--data", chats, "--out", out, "--top-k", 256, "--length", 96, "--held-out", 0.2, "--device", "cpu")
        assert cli("cache", *given, *more) == 0
        return out

    return make


def trained(folders, chats, teacher, states, objective):
    model = load_model(folders[0], "cpu").model
    choose_parameters(model, "auto")
    rows = prepare(chats, load_tokenizer(folders[0]), "model", **READ)
    training = DistillTraining(
        model, Supervised(rows.train, 2), teacher, objective, TrainingOptions(steps=4, lr=1e-3), Looks(rows.held_out, 2, 2, "last")
    )  # fmt: skip
    training.run(states)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, training.history.looks


def test_training_from_the_cache_is_training_from_the_teacher(folders, chats, made, tmp_path):
    tokenizer = load_tokenizer(folders[0])
    teacher = teacher_from(folders[1], tokenizer, "cpu")
    out = made()
    for name, top_k in (("whole", None), ("few", 8)):
        cache = open_cache(out, tokenizer, 256, teacher=folders[1], top_k=top_k)
        objective = Objective(top_k=top_k) if top_k else Objective()
        online, looked = trained(folders, chats, teacher, tmp_path / f"{name}-online", objective)
        offline, looks = trained(folders, chats, cache, tmp_path / f"{name}-offline", objective)
        for parameter, value in online.items():
            torch.testing.assert_close(offline[parameter], value, rtol=1e-3, atol=2e-5, msg=f"{name} {parameter}")
        if top_k is None:
            assert [look["kl"] for look in looks] == pytest.approx([look["kl"] for look in looked], rel=1e-3)
        assert [look["perplexity"] for look in looks] == pytest.approx([look["perplexity"] for look in looked], rel=1e-3)


def test_the_document_says_what_was_written(folders, made, capsys, chats, tmp_path):
    capsys.readouterr()
    out = made("--json", "--logp", "fp16", "--no-pack")
    document = json.loads(capsys.readouterr().out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert document["rows"] == manifest["rows"] <= 20 and document["dtype"] == "F16" and document["positions"] == manifest["positions"]
    assert document["bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors")) and manifest["teacher"] == folders[1].name
    assert cli("cache", "--model", folders[1], "--data", chats, "--out", out, "--json") == 7  # it exists
    assert cli("cache", "--model", folders[1], "--data", tmp_path / "none", "--out", tmp_path / "x", "--json") == 3


def test_rows_that_were_read_in_another_way_are_not_in_it(folders, chats, made):
    out, tokenizer = made(), load_tokenizer(folders[0])
    cache = open_cache(out, tokenizer, 256)
    assert all(sample in cache for sample in collate(prepare(chats, tokenizer, "model", **READ).train).samples)
    others = prepare(chats, tokenizer, "model", **{**READ, "seed": 5})
    with pytest.raises(ModelError, match=r"read with length 96, count answers, turns joined, documents share rows, held_out 0\.2, seed 0"):
        cache(collate(others.train))
