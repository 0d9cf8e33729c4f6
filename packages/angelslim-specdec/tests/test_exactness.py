"""The exactness kit tells right builds from wrong ones. All of it runs in `angelslim specdec check`; here are its parts."""

import json

import pytest
import torch
from click.testing import CliRunner

from angelslim_core.cli.main import cli
from angelslim_core.errors import UsageError
from angelslim_specdec.drafters.base import Warp
from angelslim_specdec.exactness import kit
from angelslim_specdec.exactness.checks import Greedy, decoded
from angelslim_specdec.exactness.drafters import Oracle, Table
from angelslim_specdec.exactness.statistics import agreement, chi_square, joint
from angelslim_specdec.exactness.subject import PROMPTS, VOCABULARY, Way, bigrams, continuation, small_target, ways
from angelslim_specdec.verification import draw


@pytest.fixture(scope="module")
def target():
    return small_target()


def test_distribution_of_continuations(target):
    found = joint(target.model, (3, 4), 2, Warp(0.9))
    assert found.shape == (VOCABULARY, VOCABULARY) and float(found.sum()) == pytest.approx(1)
    with torch.no_grad():
        first, second = (torch.softmax(target.model(input_ids=torch.tensor([ids])).logits[0, -1] / 0.9, -1) for ids in ([3, 4], [3, 4, 7]))
    assert float(found[7, 2]) == pytest.approx(float(first[7] * second[2]), rel=1e-4)


def test_p_values_are_uniform_where_nothing_is_wrong_and_small_where_something_is():
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(2 * torch.randn(4**4, generator=generator), 0).double().view(4, 4, 4, 4)

    def samples(weights):
        drawn = draw(weights.flatten().float().expand(3000, -1), torch.rand(3000, generator=generator))
        return torch.stack(torch.unravel_index(drawn, (4,) * 4), 1)

    values = torch.tensor([chi_square(samples(p), p) for _ in range(100)])
    assert 0.02 < float((values < 0.1).float().mean()) < 0.2 and 0.35 < float((values < 0.5).float().mean()) < 0.65
    assert agreement(samples(p), p) > 1e-4 and agreement(samples(p**0.8), p) < 1e-6
    impossible = p.clone()
    impossible[0] = 0
    assert chi_square(samples(p), impossible / impossible.sum()) == 0.0


def test_continuation_is_what_transformers_generates(target):
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        want = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)[0, len(prompt) :].tolist()
        assert continuation(target, prompt, 10) == want


def test_ways_are_all_that_is_registered(target):
    from angelslim_specdec.registry import drafters, drafts

    names = [way.name for way in ways(target)]
    assert {*drafters(), *drafts()} <= set(names) and len(set(names)) == len(names)


@pytest.mark.parametrize("wrong", [0, 1, 3])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_oracles_are_as_right_as_they_say(target, tree, wrong):
    greedy = Greedy(target)
    found = decoded(target, Oracle(greedy.wanted, VOCABULARY, wrong, tree), PROMPTS, 24, k=3)
    assert found.tokens == [greedy.wanted[p] for p in PROMPTS]
    assert found.acceptance_length == pytest.approx({0: 4.0, 1: 1.0, 3: 3.0}[wrong], abs=0.05)


def test_a_wrong_build_fails_a_check(target):
    greedy = Greedy(target)
    mutants = kit._mutants(target, greedy, [w for w in ways(target) if w.name in ("dflash", "eagle3")], 2048)
    assert len(mutants) == 12
    for name, context, job in mutants:
        with context:
            assert job() < kit.CAUGHT_P, name
    assert greedy.alike(Way("table", lambda: Table(bigrams(target))), (4,), PROMPTS) == 1.0  # and nothing stays replaced


def test_command(monkeypatch, tiny, tmp_path):
    few, mutants = kit._sampled_jobs, kit._mutants
    monkeypatch.setattr(kit, "ways", lambda target: [w for w in ways(target) if w.name in ("ngram", "dflash")])
    monkeypatch.setattr(kit, "_sampled_jobs", lambda *arguments: few(*arguments)[:1])
    monkeypatch.setattr(kit, "_mutants", lambda *arguments: mutants(*arguments)[:2])
    model = str(tiny("llama", dtype="float32", max_position_embeddings=512))
    options = ["--samples", "2048", "--model", model, "--draft", "ngram", "--max-new-tokens", "8", "--texts", "128", "--tolerance", "0.5", "--device", "cpu"]
    done = CliRunner().invoke(cli, ["specdec", "check", *options, "--json", "--out", str(tmp_path / "out")])
    found = json.loads(done.stdout)
    assert found["checks"] and all(m["caught"] and m["p"] < 1e-6 for m in found["mutants"])
    assert all(set(c) == {"name", "ok", "detail"} and c["ok"] for c in found["checks"])
    pair = found["pair"]
    assert pair["near_ties"]["rows"] == 4 and pair["near_ties"]["tolerance"] == 0.5 and pair["near_ties"]["ok"]
    assert all(c["ok"] and c["equal"] == 4 for c in pair["equality"]) and [c["texts"] for c in pair["sampled"]] == [128, 128]
    assert all(c["p"] > 1e-4 for c in pair["sampled"]) and done.exit_code == (0 if found["ok"] else 8)
    assert json.loads((tmp_path / "out/check.json").read_text()) == found
    page = (tmp_path / "out/check.html").read_text()
    assert "ngram with" in page and "near ties in bfloat16" in page and "batches of 4" in page and "wrong KV trim" in page


def test_a_pair_alone(monkeypatch, tiny):
    monkeypatch.setattr(kit, "run", lambda *_: pytest.fail("the small targets were to be left out"))
    options = ["--model", str(tiny("llama", dtype="float32", max_position_embeddings=512)), "--draft", "ngram", "--max-new-tokens", "8", "--texts", "128"]
    done = CliRunner().invoke(cli, ["specdec", "check", "--only-pair", "--tolerance", "0.5", "--device", "cpu", *options, "--json"])
    found = json.loads(done.stdout)
    assert found["checks"] == found["mutants"] == [] and found["ok"] == found["pair"]["ok"] and done.exit_code == (0 if found["ok"] else 8)
    assert "--only-pair" in str(CliRunner().invoke(cli, ["specdec", "check", "--only-pair"]).exception)


def test_command_says_not_ok(monkeypatch):
    from angelslim_specdec.exactness import mutants

    monkeypatch.setattr(kit, "ways", lambda target: [w for w in ways(target) if w.name in ("ngram", "dflash")])
    monkeypatch.setattr(kit, "_sampled_jobs", lambda *_: [])
    monkeypatch.setattr(kit, "_mutants", lambda *_: [])
    monkeypatch.setattr(*mutants.GREEDY["bonus from the wrong row"])
    done = CliRunner().invoke(cli, ["specdec", "check"])
    assert done.exit_code == 8 and "NOT OK" in done.stdout and done.stdout.endswith("not ok\n")


@pytest.mark.parametrize(("arguments", "number"), [(["--model", "M"], 762), (["--draft", "D"], 762), (["--prompts", "F"], 763)], ids=str)
def test_command_refuses(arguments, number):
    done = CliRunner().invoke(cli, ["specdec", "check", *arguments])
    assert isinstance(done.exception, UsageError) and done.exception.number == number
