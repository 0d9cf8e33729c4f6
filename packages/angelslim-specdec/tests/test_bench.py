"""What the bench makes of counters, and of a tiny model."""

import json

import pytest
import torch
from click.testing import CliRunner

from angelslim_core.cli.main import cli
from angelslim_core.errors import UsageError
from angelslim_specdec.bench import PLAIN, Contender, Counts, batches, bench, means, name_of, questions
from angelslim_specdec.cli.opening import open_target
from angelslim_specdec.folder import save_draft
from angelslim_specdec.registry import draft_named


def test_acceptance_length_counts_the_token_that_follows():
    counts = Counts(tokens=25, rounds=10, accepted_at=[8, 5, 2])
    assert counts.acceptance_length == pytest.approx(2.5) and counts.rates == [0.8, 0.5, 0.2]
    assert Counts(5, 0, []).acceptance_length == 1.0 and Counts().rates == []


def test_counts_add_up():
    counts = Counts(10, 4, [3, 1])
    counts.add(Counts(12, 6, [6, 6, 3]))
    assert counts == Counts(22, 10, [9, 7, 3])


def test_batches_are_of_one_size():
    assert batches([[1], [2], [3]], 2) == [[[1], [2]], [[3], [1]]] and batches([[1]], 3) == [[[1], [1], [1]]]


def fake(per_set):
    """Says what it is told to, and keeps a list of what it was asked."""
    asked = []

    def decode(prompts, contender, temperature, seed):
        asked.append((contender, temperature, len(prompts)))
        rounds, accepted = per_set[prompts[0][0]] if contender.name != PLAIN else (0, [])
        rows = len(prompts)
        said = [[1, 2, 3] if contender.name == PLAIN or n else [1, 2, 4] for n in range(rows)]
        return said, Counts(3 * rows, rows * rounds, [rows * a for a in accepted])

    return decode, asked


def test_sets_do_not_pollute_each_other():
    decode, asked = fake({7: (10, [9, 6]), 8: (10, [4, 1])})
    draft = Contender("draft", 2)
    found = bench({"a": [[7, 7], [7]], "b": [[8], [8]]}, [draft], decode, sizes=(1, 2), temperatures=(0.0, 1.0), repeats=2)
    rows = {(r["set"], r["batch"], r["temperature"], r["drafter"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"]) == 16
    for batch in (1, 2):
        for temperature in (0.0, 1.0):
            assert rows["a", batch, temperature, "draft"]["acceptance_length"] == pytest.approx(2.5)
            assert rows["b", batch, temperature, "draft"]["acceptance_length"] == pytest.approx(1.5)
            assert rows["b", batch, temperature, "draft"]["rates"] == [0.4, 0.1] and rows["b", batch, temperature, "draft"]["rounds"] == 20
            row, plain = rows["a", batch, temperature, "draft"], rows["a", batch, temperature, PLAIN]
            assert row["speedup"] == pytest.approx(row["tokens_per_s"] / plain["tokens_per_s"]) and "speedup" not in plain
    assert rows["a", 2, 0.0, "draft"]["same_text"] == 0.5 and "same_text" not in rows["a", 2, 1.0, "draft"]
    assert len(asked) == 4 * (2 + 2 * 2 * 2) + 4 * (2 + 2 * 2)  # a warm-up each, then two repeats of all batches
    (mean,) = [m for m in found["means"] if (m["batch"], m["temperature"], m["drafter"]) == (1, 0.0, "draft")]
    assert mean["acceptance_length"] == pytest.approx(2.0) and mean["rates"] == pytest.approx([0.65, 0.35]) and mean["sets"] == 2
    assert mean["speedup"] == pytest.approx((rows["a", 1, 0.0, "draft"]["speedup"] + rows["b", 1, 0.0, "draft"]["speedup"]) / 2)


def test_contenders_take_turns():
    decode, asked = fake({7: (1, [1])})
    one, two = Contender("one", 1), Contender("two", 1)
    bench({"a": [[7]]}, [one, two], decode, repeats=2)
    plain = Contender(PLAIN)
    assert [c for c, _, _ in asked] == [plain, one, two, plain, one, two, two, one, plain]


def test_means_of_unlike_widths():
    row = {"batch": 1, "temperature": 0.0, "drafter": "d", "k": 2, "tokens_per_s": 1.0}
    (mean,) = means([{**row, "rates": [0.5, 0.5]}, {**row, "rates": [0.5]}])
    assert mean["rates"] == [0.5, 0.25] and "speedup" not in mean


@pytest.fixture(scope="module")
def model(tiny):
    return str(tiny("llama", dtype="float32", max_position_embeddings=512))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    files = []
    for name in ("poems", "sums"):
        file = tmp_path_factory.mktemp("prompts") / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"turns": [f"{name} {n}, {n}, {n} and so on", "more"]}) + "\n" for n in range(3)))
        files += ["--prompts", str(file)]
    return files


def run(*arguments):
    return CliRunner().invoke(cli, ["specdec", "bench", *arguments])


def test_bench_of_a_model(model, prompts, tmp_path):
    options = [
        "--batch",
        "1,2",
        "--temperature",
        "0,1",
        "--k",
        "2,3",
        "--max-new-tokens",
        "12",
        "--repeats",
        "1",
        "--adaptive",
        "--samples",
        "2",
        "--device",
        "cpu",
    ]
    done = run("--model", model, "--draft", "suffix", *prompts, *options, "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert found["fused_modules"] == {}  # on a CPU modules run as they are
    ways = ["plain", "suffix", "suffix", "suffix, adaptive", "ngram"]
    assert [r["drafter"] for r in found["rows"]] == ways * 8 and [r["drafter"] for r in found["means"]] == ways * 4
    for row in found["rows"]:
        assert row["tokens_per_s"] > 0 and row["tokens"] > 0
        if row["drafter"] != PLAIN:
            assert 1 <= row["acceptance_length"] <= 1 + row["k"] and len(row["rates"]) == row["k"]
            assert row["acceptance_length"] == pytest.approx(1 + sum(row["rates"]))
            assert row["temperature"] or row["same_text"] == 1.0
    assert len(found["transformers"]) == 4 and json.loads((tmp_path / "bench.json").read_text()) == found
    page = (tmp_path / "bench.html").read_text()
    assert page.count("<svg") == 2 and "suffix, adaptive" in page and "<script" not in page


def test_trees_run_beside_chains(model, prompts, tmp_path):
    torch.manual_seed(0)
    save_draft(draft_named("eagle3").from_target(open_target(model, "cpu").shape).eval(), tmp_path / "d")
    options = ["--k", "2", "--tree", "2", "5", "--tree", "3", "4", "--max-new-tokens", "8", "--repeats", "1", "--samples", "1", "--device", "cpu"]
    done = run("--model", model, "--draft", str(tmp_path / "d"), *prompts[:2], *options, "--transformers", "0", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert [r["drafter"] for r in found["rows"]] == ["plain", "d", "d, tree 2 x 5", "d, tree 3 x 4", "ngram"] and found["transformers"] == []
    assert all(r["same_text"] == 1.0 for r in found["rows"][1:])


def test_a_target_is_opened_as_its_modules_are_or_fused(model):
    assert open_target(model, "cpu", fused=True).fused["norms"] == 5 and open_target(model, "cpu", fused=False).fused == {}


def test_first_questions(tmp_path):
    file = tmp_path / "p.jsonl"
    says = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": says}, {"turns": ["d", "e"]}, {"prompt": "f"})))
    assert [[m["content"] for m in chat] for chat in questions(file, 2)] == [["be brief", "a"], ["d"]]


def test_bench_prints_a_table(model, prompts):
    done = run("--model", model, "--draft", "ngram", *prompts[:2], "--max-new-tokens", "4", "--repeats", "1", "--samples", "1", "--device", "cpu")
    assert done.exit_code == 0 and "acceptance length" in done.stdout and "ngram" in done.stdout and "1 + accepted / rounds" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (["--batch", "many"], 766),
        (["--batch", "0"], 767),
        (["--k", "4,4"], 767),
        (["--temperature", "-1"], 767),
        (["--draft", "here/one", "--draft", "elsewhere/one"], 764),
        (["--max-new-tokens", "600"], 765),
    ],
    ids=str,
)
def test_bench_refuses(arguments, number, model, prompts):
    done = run("--model", model, "--draft", "suffix", *prompts[:2], "--device", "cpu", *arguments)
    assert isinstance(done.exception, UsageError) and done.exception.number == number


def test_a_folder_is_no_drafter_of_its_name(tmp_path, tiny, monkeypatch):
    from angelslim_core.loading import load_model
    from angelslim_specdec.folder import save_draft
    from angelslim_specdec.registry import draft_named
    from angelslim_specdec.target import Target

    assert [name_of(d) for d in ("ngram", "some/suffix", "./plain", "some/eagle")] == ["ngram", "suffix (folder)", "plain (folder)", "eagle"]
    model = tiny("llama", dtype="float32", max_position_embeddings=512)
    shape = Target(load_model(model, "cpu").model).shape
    save_draft(draft_named("mtp").from_target(shape), tmp_path / "plain")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    monkeypatch.chdir(tmp_path)
    done = run("--model", str(model), "--draft", "plain", "--prompts", str(prompts), "--max-new-tokens", "6", "--repeats", "1", "--device", "cpu", "--json")
    found = {r["drafter"]: r for r in json.loads(done.stdout)["rows"]}
    assert found.keys() == {"plain", "plain (folder)", "ngram"} and found["plain (folder)"]["rounds"] and "rounds" not in found["plain"]
