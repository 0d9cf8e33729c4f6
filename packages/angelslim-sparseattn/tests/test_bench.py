"""`angelslim sparseattn bench` and `choose` on a tiny model."""

import json

import pytest
import torch
import yaml
from click.testing import CliRunner

from angelslim_core import compress, load
from angelslim_core.cli.main import cli
from angelslim_core.errors import UsageError
from angelslim_core.recipe import load_recipe
from angelslim_core.testing.models import tiny_checkpoint
from angelslim_sparseattn.candidates import candidates
from angelslim_sparseattn.choose import Measured, cheapest, configuration, summary
from angelslim_sparseattn.cli import _TRIED
from angelslim_sparseattn.config import SparseAttentionConfig, shape_of
from angelslim_sparseattn.coupling import attach, attachment

SHAPE = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32", "--device", "cpu"]
WINDOWS = "a_shape:n_init=16:n_local=16,a_shape:n_init=16:n_local=48"


@pytest.fixture(scope="module")
def model(tiny):
    return str(tiny("llama", num_hidden_layers=3))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {n}: the quick brown fox jumps over the lazy dog. " for n in range(20)))
    return str(file)


def run(*arguments):
    return CliRunner().invoke(cli, ["sparseattn", *arguments])


def document(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_bench_of_random_input(tmp_path):
    found = document("bench", "--lengths", "64,96", "--policies", f"{WINDOWS},stem", "--block", "16", "--repeats", "2", "--out", str(tmp_path), *SHAPE)
    assert found["schema_version"] == 1 and "say nothing about text" in found["note"] and found["machine"]["device"] == "cpu"
    assert [(r["length"], r["policy"]) for r in found["rows"]] == [(n, p) for n in (64, 96) for p in (*WINDOWS.split(","), "stem")]
    assert [(r["length"], r["name"]) for r in found["dense"]] == [(64, "sdpa"), (96, "sdpa")]
    narrow, wide, stem = found["rows"][3:]
    assert narrow["density"] < wide["density"] < stem["density"] == 1
    assert narrow["recall_p5"] < narrow["recall_mean"] < wide["recall_mean"] < stem["recall_mean"] == pytest.approx(1)
    assert narrow["output_error"] > wide["output_error"] > stem["output_error"] == pytest.approx(0, abs=1e-6)
    for row in found["rows"]:
        assert row["executor"] == "torch" and min(row["select_ms"], row["kernel_ms"], row["total_ms"]) > 0
        assert row["speedup"]["sdpa"] == pytest.approx(next(d["ms"] for d in found["dense"] if d["length"] == row["length"]) / row["total_ms"])
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    page = (tmp_path / "bench.html").read_text()
    assert page.count("<svg") == 2 and "a_shape:n_init=16:n_local=48" in page and "<script" not in page and "http-equiv" in page


def test_bench_prints_tables():
    done = run("bench", "--lengths", "64", "--policies", "a_shape", "--block", "16", "--repeats", "1", *SHAPE)
    assert done.exit_code == 0 and "x sdpa" in done.stdout and "a_shape" in done.stdout and "note: random" in done.stderr


def test_bench_of_a_model(model, text):
    options = ["--model", model, "--text", text, "--lengths", "128", "--block", "16", "--repeats", "1", "--device", "cpu"]
    found = document("bench", *options, "--policies", WINDOWS, "--layers", "0,2")
    assert found["inputs"] == "model reading text.txt" and not found["note"] and [r["layers"] for r in found["rows"]] == [2, 2]
    assert 0 < found["rows"][0]["recall_mean"] < found["rows"][1]["recall_mean"] < 1
    ttft = document("bench", *options, "--policies", "a_shape:n_init=16:n_local=16:min_len=100:dense_layers=[1],stem", "--ttft")["ttft"]
    assert [(r["policy"].partition(":")[0], r.get("sparse_layers"), r.get("layers")) for r in ttft] == [
        ("dense", None, None),
        ("a_shape", 2, 3),
        ("stem", 0, 3),
    ]
    assert ttft[1]["density"] < 1 and ttft[2]["density"] is None and ttft[1]["speedup"] == pytest.approx(ttft[0]["ms"] / ttft[1]["ms"])


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--policies", "nonsense"], "520", "no policy 'nonsense'"),
        (["--policies", "stem:rate=2"], "521", "stem.rate"),
        (["--policies", "stem:rate"], "582", "is no option"),
        (["--policies", "stem:rate=[1"], "583", "has no value"),
        (["--policies", "stem,stem"], "581", "twice"),
        (["--lengths", "8k"], "584", "no list of numbers"),
        (["--lengths", "0"], "586", "below 1"),
        (["--heads", "3"], "585", "no multiple"),
        (["--layers", "0"], "587", "needs --model"),
        (["--model", "M"], "588", "needs --text"),
        (["--model", "M", "--text", "T", "--heads", "4"], "588", "is of random input"),
        (["--model", "M", "--text", "T", "--ttft", "--layers", "0"], "589", "attention alone"),
        (["--model", "M", "--text", "T", "--layers", "7"], "590", "0 to 2"),
        (["--model", "M", "--text", "T", "--lengths", "64,5000"], "032", "less than one window of 5000"),
        (["--executor", "magic"], "033", "no implementation 'magic'"),
    ],
    ids=str,
)
def test_bench_refuses(arguments, code, what, model, text):
    given = [{"M": model, "T": text}.get(a, a) for a in arguments]
    done = run("bench", *(given if "--lengths" in given else [*given, "--lengths", "64"]), "--device", "cpu", "--block", "16")
    assert isinstance(done.exception, UsageError) and done.exception.code == f"AS-USE-{code}" and what in str(done.exception)


def test_a_model_without_such_attention_is_refused(text, tmp_path, tmp_path_factory):
    model = tiny_checkpoint("gemma3_text", tmp_path_factory.mktemp("sliding"), num_hidden_layers=1, layer_types=["sliding_attention"])
    done = run("choose", str(model), "--text", text, "--length", "64", "--out", str(tmp_path / "p.json"), "--device", "cpu")
    assert isinstance(done.exception, UsageError) and done.exception.number == 591 and not list(tmp_path.iterdir())


def test_options_of_policies():
    found = candidates("stem:rate=.1:n_init=16,a_shape:dense_layers=[0, 2],xattention")
    assert [(c.name, dict(c.options)) for c in found] == [("stem", {"rate": 0.1, "n_init": 16}), ("a_shape", {"dense_layers": [0, 2]}), ("xattention", {})]


def measured():
    density = torch.tensor([[[0.2, 0.2], [0.5, 0.5]], [[0.2, 0.2], [0.5, 0.5]], [[0.2, 0.2], [0.5, 0.5]]], dtype=torch.float64)
    recall = torch.tensor([[[0.96, 0.97], [1, 1]], [[0.9, 0.97], [0.95, 0.99]], [[0.5, 0.5], [0.9, 0.94]]], dtype=torch.float64)
    return Measured((1, 2, 5), density, recall)


def test_the_cheapest_that_suffices():
    found, chosen = measured(), candidates(WINDOWS)
    choice = cheapest(found, 0.95)
    assert choice.tolist() == [[0, 0], [1, 0], [-1, -1]]
    assert cheapest(found, 0.95, "layer").tolist() == [[0, 0], [1, 1], [-1, -1]]
    config = configuration(choice, found, chosen, (0,), min_len=64)
    assert config.policy == "a_shape" and config.options["n_local"] == 16 and config.dense_layers == (0, 5) and len(config.overrides) == 1
    assert config.overrides[0].model_dump() == {"layers": (2,), "heads": (0,), "policy": "a_shape", "options": {"n_init": 16, "n_local": 48}}
    told = summary(choice, found, chosen)
    assert told["density"] == pytest.approx((0.2 + 0.2 + 0.5 + 0.2 + 1 + 1) / 6) and told["recall_worst"] == 0.95 and told["dense_heads"] == 2
    assert [c["heads"] for c in told["candidates"]] == [3, 1]
    head = cheapest(Measured((1,), found.density[2:], torch.tensor([[[0.96, 0.5], [1, 0.5]]])), 0.95)
    mixed = configuration(head, Measured((1,), found.density[2:], found.recall[2:]), chosen, ())
    assert head.tolist() == [[0, -1]] and mixed.overrides[0].policy == "dense" and mixed.overrides[0].heads == (1,)
    with pytest.raises(UsageError, match="no policy reaches"):
        configuration(torch.full((1, 2), -1), Measured((1,), found.density[:1], found.recall[:1]), chosen, ())


def test_stem_by_share_is_tried_and_first_among_equals():
    chosen = candidates(_TRIED)
    shares = [c for c in chosen if "tau" in c.options and c.name == "stem"]
    assert chosen[: len(shares)] == shares and [c.options["tau"] for c in shares] == [0.8, 0.9, 0.95, 0.98, 0.995]
    assert all(c.options["alpha"] == pytest.approx(max(0.9, 2 * c.options["tau"] - 1)) for c in shares)
    equal = torch.full((1, len(chosen), 2), 0.5, dtype=torch.float64)
    choice = cheapest(Measured((3,), equal, equal + 0.4), 0.9)
    config = configuration(choice, Measured((3,), equal, equal + 0.4), chosen, ())
    assert choice.tolist() == [[0, 0]] and (config.policy, config.options) == ("stem", dict(shares[0].options))


def test_stem_by_share_stands_beside_others_in_one_layer(model):
    chosen = candidates("stem:score=mass:tau=.7:stride=4:n_init=0:n_local=0,stem:rate=.1:stride=4:n_init=16:n_local=16,xattention:tau=.5:stride=4")
    found = Measured((1, 2), torch.full((2, 3, 4), 0.5), torch.ones(2, 3, 4))
    config = configuration(torch.tensor([[0, 0, 1, 2], [0, 0, 0, -1]]), found, chosen, (0,), min_len=64, block=16)
    assert config.options["tau"] == 0.7 and [(o.layers, o.heads, o.policy) for o in config.overrides] == [
        ((1,), (2,), "stem"), ((1,), (3,), "xattention"), ((2,), (3,), "dense"),
    ]  # fmt: skip
    loaded, _ = load(model, device="cpu")
    with attach(loaded, config) as attached, torch.no_grad():
        loaded(torch.arange(3, 131)[None])
        assert [s["sparse"] for s in attached.stats()] == [0, 1, 1] and all(0 < s["density"] < 1 for s in attached.stats()[1:])


def test_choose_writes_what_it_measured(model, text, tmp_path):
    options = ["--text", text, "--length", "128", "--windows", "2", "--block", "16", "--dense-layers", "0", "--device", "cpu"]
    first = document(
        "choose", model, *options, "--policies", WINDOWS, "--recall", "0.4", "--out", str(tmp_path / "p.json"), "--report", str(tmp_path / "p.html")
    )
    assert first["tokens"] == 256 and [row["layer"] for row in first["layers"]] == [1, 2] and all(len(row["heads"]) == 4 for row in first["layers"])
    for row in first["layers"]:
        assert all(head["recall"] >= 0.4 or head["policy"] == "dense" for head in row["heads"])
    narrow, wide = first["candidates"]
    assert narrow["density"] < wide["density"] and narrow["recall"] < wide["recall"]
    assert (tmp_path / "p.html").read_text().count("<svg") == 2
    config = SparseAttentionConfig.model_validate(json.loads((tmp_path / "p.json").read_text()))
    assert config.model_dump(mode="json") == first["config"] and config.min_len == 128
    loaded, _ = load(model, device="cpu")
    assert config.chosen_for == shape_of(loaded.config.to_dict())
    with attach(loaded, config) as attached, torch.no_grad():
        loaded(torch.arange(3, 131)[None])
        densities = [s["density"] for s in attached.stats() if s["density"] is not None]
    assert sum(densities) / len(densities) == pytest.approx(first["density"])

    again = run("choose", model, *options, "--policies", WINDOWS, "--recall", "0.4", "--by", "layer", "--out", str(tmp_path / "p.yaml"))
    assert again.exit_code == 0 and "worst head" in again.stdout
    recipe = load_recipe(tmp_path / "p.yaml")
    compress(model, out=tmp_path / "out", recipe=tmp_path / "p.yaml")
    artifact, _ = load(tmp_path / "out", device="cpu")
    found = attachment(artifact)
    assert found is not None and found.config.min_len == 128 and found.config.block == 16
    third = document("choose", str(tmp_path / "out"), *options, "--policies", WINDOWS, "--recall", "0.4", "--out", str(tmp_path / "q.json"))
    assert third["candidates"] == first["candidates"]  # measured on the dense model
    assert recipe.steps[0].use == "sparseattn.a_shape" and yaml.safe_load((tmp_path / "p.yaml").read_text())["steps"][0]["with"]["min_len"] == 128


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--out", "p.txt"], "580"),
        (["--out", "p.json", "--length", "100000"], "032"),
        (["--out", "p.json", "--dense-layers", "0,1,2"], "591"),
        (["--out", "p.json", "--policies", "a_shape:min_len=3"], "594"),
        (["--out", "p.json", "--recall", "1", "--policies", "a_shape:n_local=16"], "593"),
    ],
    ids=str,
)
def test_choose_refuses(arguments, code, model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = arguments if "--length" in arguments else [*arguments, "--length", "64"]
    given = given if "--dense-layers" in given else [*given, "--dense-layers", ""]
    done = run("choose", model, "--text", text, "--block", "16", "--device", "cpu", *given)
    assert isinstance(done.exception, UsageError) and done.exception.code == f"AS-USE-{code}" and not list(tmp_path.iterdir())
