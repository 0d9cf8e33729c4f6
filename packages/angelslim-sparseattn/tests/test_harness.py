import json
import math

import click.testing
import pytest
import torch

from angelslim_core import compress
from angelslim_core.errors import UsageError
from angelslim_core.loading import load_model
from angelslim_core.testing.models import tiny_checkpoint
from angelslim_sparseattn import harness
from angelslim_sparseattn.cli_accuracy import accuracy_command
from angelslim_sparseattn.config import SparseAttentionConfig
from angelslim_sparseattn.harness import Method, accuracy, language, written
from angelslim_sparseattn.tasks.base import Sample

LENGTH = 1024
SMALL = {"block": 16, "min_len": 0, "dense_layers": (0,)}
SPARSE = Method("sparse", SparseAttentionConfig(policy="a_shape", options={"n_init": 16, "n_local": 16}, **SMALL))
FULL = Method("full", SparseAttentionConfig(policy="a_shape", options={"n_init": 16, "n_local": 1 << 20}, **SMALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("tiny"), dtype="float32", max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, "cpu")


def test_dense_comes_first_and_says_what_the_model_cannot_do(loaded):
    rows = accuracy(loaded.model, loaded.tokenizer, [SPARSE], ["niah_single", "vt"], [LENGTH], samples=2)
    assert [(r["method"], r["task"], r["able"]) for r in rows] == [("dense", "niah_single", False), ("dense", "vt", False)]
    assert all(r["accuracy"] == 0 and r["samples"] == 2 for r in rows)


def test_policies_are_tried_where_dense_is_able(loaded, monkeypatch):
    answers = {}
    monkeypatch.setattr(harness, "written", lambda model, tokenizer, prompt: answers.setdefault(prompt.ids, " ".join(prompt.answers)))
    rows = accuracy(loaded.model, loaded.tokenizer, [SPARSE], ["niah_single"], [LENGTH], samples=3)
    assert [(r["method"], r["accuracy"], r["stderr"]) for r in rows] == [("dense", 1, 0), ("sparse", 1, 0)]
    assert len(answers) == 3  # the same prompts for both


def test_writing_is_what_the_model_does_step_by_step(loaded):
    prompt = Sample(tuple(range(3, 203)), 6, ("a",))
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        for _ in range(prompt.new_tokens):
            ids = torch.cat([ids, loaded.model(ids).logits[:, -1:].argmax(-1)], 1)
    assert written(loaded.model, loaded.tokenizer, prompt) == loaded.tokenizer.decode(ids[0, 200:], skip_special_tokens=True)


def test_perplexity_and_kl_against_a_computation_in_one_piece(loaded):
    ids = torch.randint(3, 256, (2, 600), generator=torch.Generator().manual_seed(0))
    dense, full, sparse = language(loaded.model, [FULL, SPARSE], ids)
    with torch.no_grad():
        log_p = loaded.model(ids).logits[:, :-1].double().log_softmax(-1)
        with harness.following(loaded.model, SPARSE) as found:
            log_q = loaded.model(ids).logits[:, :-1].double().log_softmax(-1)
    assert dense["perplexity"] == pytest.approx(math.exp(-log_p.gather(-1, ids[:, 1:, None]).mean()), rel=1e-5)
    assert sparse["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert sparse["density"] == pytest.approx(found["density"]) and 0 < sparse["density"] < 0.2 and sparse["sparse_layers"] == 1
    assert abs(full["kl"]) < 1e-5 < sparse["kl"] and full["density"] == 1 and full["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert "kl" not in dense and len(sparse["kls"]) == 2


def test_more_tokens_than_positions(loaded):
    with pytest.raises(UsageError, match="more than the model's"):
        accuracy(loaded.model, loaded.tokenizer, [], ["niah_single"], [2 * LENGTH], samples=1)


def test_the_command(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A sentence of some words that goes on. " * 200)
    arguments = [str(folder), "--tasks", "niah_single", "--lengths", str(LENGTH), "--samples", "1", "--policies", "stem:rate=.1:n_init=16:n_local=16"]
    arguments += ["--text", str(text), "--windows", "1", "--block", "16", "--dense-layers", "0", "--able", "0", "--device", "cpu"]
    run = click.testing.CliRunner().invoke(accuracy_command, [*arguments, "--json", "--out", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document == json.loads((tmp_path / "out/accuracy.json").read_text())
    assert [r["method"] for r in document["rows"]] == ["dense", "stem:rate=.1:n_init=16:n_local=16"] == [r["method"] for r in document["language"]]
    assert document["rows"][1]["density"] < 0.5 and document["language"][1]["kl"] > 0
    steps = [{"use": "sparseattn.a_shape", "with": {"n_init": 16, "n_local": 16, "block": 16, "min_len": 0}}]
    compress(folder, out=tmp_path / "sparse", recipe={"version": 1, "steps": steps})  # whose own policy is not what dense means
    arguments[0] = str(tmp_path / "sparse")
    run = click.testing.CliRunner().invoke(accuracy_command, [*arguments, "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["language"] == document["language"]
    shown = click.testing.CliRunner().invoke(accuracy_command, [*arguments[:-4], "--able", "1", "--device", "cpu"])
    assert "no policy was tried there" in shown.output and "KL to dense" in shown.output


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--tasks", "nothing"], "no task 'nothing'"),
        (["--policies", "stem:rat=1"], "stem.rat"),
        (["--lengths", "4k"], "no list of numbers"),
        (["--dense-layers", "x"], "no list of numbers"),
        (["--lengths", "64"], "takes at least"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_the_command_refuses(folder, options, what):
    run = click.testing.CliRunner().invoke(accuracy_command, [str(folder), "--tasks", "vt", "--samples", "1", "--device", "cpu", *options])
    assert isinstance(run.exception, UsageError) and what in str(run.exception)
