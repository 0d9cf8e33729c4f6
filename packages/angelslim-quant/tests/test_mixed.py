"""Mixed precision: the knapsack, measured sensitivities, and what a run makes of them."""

import copy
import itertools
import json
import random
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from click.testing import CliRunner

import angelslim_quant.plugin as plugin
from angelslim_core import compress, evaluate
from angelslim_core.cli.main import cli
from angelslim_core.context import Context
from angelslim_core.errors import AngelslimError, ModelError, PlanError, StoppedError
from angelslim_core.io.checkpoint import read_header
from angelslim_core.model import Skeleton
from angelslim_core.parallel import Group
from angelslim_core.pipeline import calibrate, prepare
from angelslim_core.records import read_records
from angelslim_core.testing.conformance import check_pass
from angelslim_core.validation import validate
from angelslim_quant import sensitivity
from angelslim_quant.measuring import measure_model
from angelslim_quant.numerics.knapsack import Knapsack

OPTIONS = {"candidates": ["int2", "int3", "int4", "int8a16"], "group_size": 16}


def test_conformance(tmp_path):
    check_pass("quant", plugin, "quant.mixed", tmp_path, group_size=32, candidates=["int3", "int4", "int8", "keep"], samples=2)


@pytest.mark.parametrize("states", [1 << 16, 16])
def test_the_knapsack_is_as_good_as_trying_everything(monkeypatch, states):
    monkeypatch.setattr("angelslim_quant.numerics.knapsack.STATES", states)
    draw = random.Random(0)
    for _ in range(60):
        unit = draw.choice([1, 7])
        costs = [[unit * draw.randint(1, 40) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 5))]
        losses = [[draw.random() for _ in row] for row in costs]
        knapsack = Knapsack(costs, losses)
        budget = draw.randint(knapsack.lowest, knapsack.highest)
        chosen = knapsack.choose(budget)
        loss = sum(row[i] for row, i in zip(losses, chosen, strict=True))
        assert sum(row[i] for row, i in zip(costs, chosen, strict=True)) <= budget
        assert loss == pytest.approx(knapsack.loss(budget))
        if states > 16:
            every = itertools.product(*(range(len(row)) for row in costs))
            cost_of = lambda pick, table: sum(row[i] for row, i in zip(table, pick, strict=True))  # noqa: E731
            assert loss == pytest.approx(min(cost_of(pick, losses) for pick in every if cost_of(pick, costs) <= budget))


def test_a_larger_budget_never_loses_more():
    draw = random.Random(1)
    for states in (12, 1 << 16):
        costs = [[draw.randint(1, 1000) for _ in range(4)] for _ in range(8)]
        losses = [[draw.random() for _ in range(4)] for _ in range(8)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("angelslim_quant.numerics.knapsack.STATES", states)
            knapsack = Knapsack(costs, losses)
            found = [knapsack.loss(budget) for budget in range(knapsack.lowest, knapsack.highest + 1)]
        assert found == sorted(found, reverse=True)
        with pytest.raises(ValueError):
            knapsack.choose(knapsack.lowest - 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "box", "with", "a", "frozen", "pumpkin"]
    generator = torch.Generator().manual_seed(0)
    path.write_text(" ".join(words[i] for i in torch.randint(len(words), (900,), generator=generator).tolist()))
    return path


@pytest.fixture(scope="module")
def calibration(text):
    return {"data": str(text), "samples": 16, "tokens": 64, "batch_size": 2}


@pytest.fixture(scope="module")
def measured(tiny, calibration, tmp_path_factory):
    """A sensitivity file of the tiny Llama, and what the command reports."""
    path = tmp_path_factory.mktemp("measured") / "llama.json"
    return path, measure_model(tiny("llama"), path, calibration, OPTIONS)


def run(model, out, calibration, **options):
    return compress(model, out=out, recipe={"calibration": calibration, "steps": [{"use": "quant.mixed", "with": {**OPTIONS, **options}}]})


def stored_bits(folder):
    """Bits a weight of what a folder holds of its linears, counted in its headers."""
    bits = 0
    for path in folder.glob("*.safetensors"):
        for name, info in read_header(path).items():
            if "layers" in name and "_proj" in name and not name.endswith(".weight_shape"):
                bits += 8 * info.nbytes
    plan = read_records(folder)["plan"]
    weights = sum(row["shape"][0] * row["shape"][1] for row in plan["tensors"] if "_proj" in row["tensor"])
    return bits / weights


def test_more_bits_are_predicted_to_lose_less(measured):
    for unit in measured[1]["units"]:
        losses = [unit["kl"][name] for name in OPTIONS["candidates"]]
        assert losses == sorted(losses, reverse=True) and losses[-1] > 0, unit


def test_predictions_rank_units_as_their_kl_does(tiny, tmp_path, text, calibration, measured):
    predicted, actual = [], []
    for unit in measured[1]["units"]:
        names = json.loads(measured[0].read_text())["units"][unit["unit"]]["linears"]
        step = {"use": "quant.gptq", "with": {"bits": 2, "group_size": 16}, "targets": names}
        compress(tiny("llama"), out=tmp_path / unit["unit"], recipe={"calibration": calibration, "steps": [step]})
        predicted.append(unit["kl"]["int2"])
        actual.append(evaluate(tmp_path / unit["unit"], tiny("llama"), text=text, windows=6, length=128)["kl"])
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (predicted, actual)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.8, (predicted, actual)
    assert 0.4 < sum(predicted) / sum(actual) < 2.5


@pytest.mark.parametrize("bits", [3.4, 4.5, 6.01])
def test_a_run_keeps_to_its_budget_and_fused_sets_are_uniform(tiny, tmp_path, calibration, measured, bits):
    result = run(tiny("llama"), tmp_path / "out", calibration, bits=bits, sensitivity=str(measured[0]))
    found = next(p for p in result.passes if p["id"] == "quant.mixed")["metrics"]
    assert bits - 0.35 < stored_bits(tmp_path / "out") <= bits
    assert found["bits_per_weight"] == pytest.approx(stored_bits(tmp_path / "out"), abs=1e-4)
    assert sum(found[f"linears_{name}"] for name in OPTIONS["candidates"]) == 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and len(config["config_groups"]) > 1
    validated = validate(tmp_path / "out", tiny("llama"))
    assert validated["ok"], validated["problems"]
    schemes = {r["tensor"]: r["action"] for r in read_records(tmp_path / "out")["plan"]["tensors"]}
    for layer in range(2):
        for names in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({schemes[f"model.layers.{layer}.{n}_proj.weight"] for n in names}) == 1
    x, y = zip(*found["curves"][0]["points"], strict=True)
    assert list(x) == sorted(x) and list(y) == sorted(y, reverse=True)
    assert found["curves"][0]["mark"] == [found["bits_per_weight"], found["predicted_kl"]]


def test_it_measures_when_no_file_is_given_and_finds_the_same(tiny, tmp_path, calibration, measured):
    model = tiny("llama")
    first = run(model, tmp_path / "own", calibration, bits=4.5).passes[0]["metrics"]
    second = run(model, tmp_path / "read", calibration, bits=4.5, sensitivity=str(measured[0])).passes[0]["metrics"]
    assert first == second
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "read")]
    assert files[0] == files[1]


def test_it_beats_one_scheme_for_all_at_the_same_size(tiny, tmp_path, text, calibration):
    model = tiny("llama")
    mixed = run(model, tmp_path / "mixed", calibration, bits=4, candidates=["int2", "int3", "int4", "int6"])
    uniform = compress(
        model, out=tmp_path / "uniform", recipe={"calibration": calibration, "steps": [{"use": "quant.gptaq", "with": {"bits": 3, "group_size": 16}}]}
    )
    assert mixed.bytes_after <= uniform.bytes_after
    kl = [evaluate(tmp_path / name, model, text=text, windows=6, length=128)["kl"] for name in ("mixed", "uniform")]
    assert kl[0] < kl[1], kl


def test_experts_of_a_layer_take_one_scheme(tiny, tmp_path, calibration):
    result = run(tiny("qwen3_moe"), tmp_path / "out", calibration, bits=3.8, samples=4)
    by_layer = defaultdict(set)
    for row in read_records(tmp_path / "out")["plan"]["tensors"]:
        if ".experts." in row["tensor"]:
            by_layer[row["tensor"].split(".")[2]].add(row["action"])
    assert by_layer and all(len(actions) == 1 for actions in by_layer.values())
    units = result.passes[0]["metrics"]["units"]
    assert [u["unit"] for u in units if u["unit"].endswith("experts")] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert all(u["kl"]["int2"] > u["kl"]["int8a16"] > 0 for u in units)
    assert validate(tmp_path / "out", tiny("qwen3_moe"))["ok"]


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3_next", "deepseek_v3"])
def test_other_architectures_are_measured(tiny, tmp_path, calibration, architecture):
    found = measure_model(
        tiny(architecture), tmp_path / "f.json", {**calibration, "samples": 4}, {**OPTIONS, "group_size": 8, "candidates": ["int3", "fp8", "keep"]}
    )
    for unit in found["units"]:
        assert unit["kl"]["int3"] > unit["kl"]["fp8"] > unit["kl"]["keep"] == 0, unit


def test_a_dry_run_says_what_is_open(tiny, calibration, measured):
    step = {"use": "quant.mixed", "with": {**OPTIONS, "bits": 4.0}}
    plan = prepare(tiny("llama"), recipe={"calibration": calibration, "steps": [step]}).plan
    assert len(plan.problems) == 1 and "decided by measuring" in plan.problems[0]
    step["with"]["sensitivity"] = str(measured[0])
    final = prepare(tiny("llama"), recipe={"calibration": calibration, "steps": [step]}).plan
    assert not final.problems
    assert plan.bytes_after == pytest.approx(final.bytes_after, rel=0.05)


def test_a_budget_too_small_names_the_least(tiny, calibration):
    with pytest.raises(PlanError, match=r"3\.0000") as caught:
        prepare(tiny("llama"), recipe={"calibration": calibration, "steps": [{"use": "quant.mixed", "with": {**OPTIONS, "bits": 2.9}}]})
    assert caught.value.code == "AS-PLN-341"
    prepare(tiny("llama"), recipe={"calibration": calibration, "steps": [{"use": "quant.mixed", "with": {**OPTIONS, "bits": 3}}]})


def test_linears_outside_the_layers_are_refused(tiny, calibration):
    with pytest.raises(PlanError, match="outside the decoder layers"):
        prepare(tiny("llama"), recipe={"calibration": calibration, "steps": [{"use": "quant.mixed", "with": OPTIONS, "targets": ["mlp", "lm_head"]}]})


def refusal(model, path, calibration, **options):
    with pytest.raises(AngelslimError) as caught:
        prepare(model, recipe={"calibration": calibration, "steps": [{"use": "quant.mixed", "with": {**OPTIONS, "sensitivity": str(path), **options}}]})
    assert "\n" not in str(caught.value)
    return caught.value.code


def test_a_file_of_something_else_is_refused(tiny, tmp_path, calibration, measured):
    model, path = tiny("llama"), measured[0]
    assert refusal(tiny("llama", seed=1), path, calibration) == "AS-PLN-290"
    assert refusal(tiny("llama", num_hidden_layers=3), path, calibration) == "AS-PLN-290"
    assert refusal(model, path, calibration, group_size=32) == "AS-PLN-291"
    assert refusal(model, path, calibration, symmetric=False) == "AS-PLN-291"
    assert refusal(model, path, calibration, candidates=["int4", "fp8"]) == "AS-PLN-293"
    assert refusal(model, tmp_path / "none.json", calibration) == "AS-MOD-002"
    document = json.loads(path.read_text())
    document["units"].pop("model.layers.1.mlp.down_proj")
    (tmp_path / "less.json").write_text(json.dumps(document))
    assert refusal(model, tmp_path / "less.json", calibration) == "AS-PLN-292"


@pytest.mark.parametrize(
    "edit",
    [
        {"units": {"x": {"linears": [], "kl": {"int4": -1.0}}}},
        {"units": {"x": {"linears": [], "kl": {"int4": "1"}}}},
        {"units": {"x": {"linears": [], "kl": {"int4": 1e300}}}},
        {"units": []},
        {"schema_version": 2},
        {"model": 5},
        {"more": 1},
        {"group_size": True},
    ],
    ids=str,
)
def test_a_hostile_file_is_refused(tiny, tmp_path, calibration, measured, edit):
    (tmp_path / "bad.json").write_text(json.dumps(json.loads(measured[0].read_text()) | edit))
    assert refusal(tiny("llama"), tmp_path / "bad.json", calibration) == "AS-MOD-290"


def test_what_is_no_json_is_refused(tiny, tmp_path, calibration):
    for content in (b"", b"[]", b"{" * 1000, b'{"units": NaN}', b"\xff"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ModelError):
            prepare(tiny("llama"), recipe={"calibration": calibration, "steps": [{"use": "quant.mixed", "with": {"sensitivity": str(tmp_path / "bad.json")}}]})


def test_a_stopped_measurement_goes_on_where_it_was(tiny, tmp_path, calibration, measured, monkeypatch):
    model, recipe = tiny("llama"), {"calibration": calibration, "steps": [{"use": "quant.mixed", "with": {**OPTIONS, "bits": 4.5}}]}
    backward, calls = sensitivity._backward, []

    def counted(layer, *rest):
        calls.append(layer.index)
        return backward(layer, *rest)

    monkeypatch.setattr(sensitivity, "_backward", counted)
    with pytest.raises(StoppedError):
        compress(model, out=tmp_path / "out", recipe=recipe, stop_requested=lambda: 1 in calls)
    assert set(calls) == {1}
    kept = tmp_path / ".out.angelslim" / "measured"
    assert json.loads((kept / "losses.json").read_text())["layer"] == 1
    calls.clear()
    result = compress(model, out=tmp_path / "out", recipe=recipe)
    assert set(calls) == {0}
    whole = {u["unit"]: u["kl"] for u in measured[1]["units"]}
    assert {u["unit"]: u["kl"] for u in result.passes[0]["metrics"]["units"]} == whole
    assert not kept.exists()


def test_the_command(tiny, tmp_path, calibration):
    arguments = ["quant", "sensitivity", "--model", str(tiny("llama")), "--data", calibration["data"], "--out", str(tmp_path / "f.json")]
    arguments += ["--group-size", "16", "--samples", "4", "--tokens", "32", "--device", "cpu"]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1 and document["path"] == str(tmp_path / "f.json") and len(document["units"]) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.json"]
    again = CliRunner().invoke(cli, arguments)
    assert isinstance(again.exception, AngelslimError) and again.exception.code == "AS-OUT-002"
    shown = CliRunner().invoke(cli, [*arguments, "--replace"])
    assert shown.exit_code == 0 and "predicted KL" in shown.output
    folder = CliRunner().invoke(cli, [*arguments[:-9], str(tmp_path), "--replace"])
    assert folder.exit_code or folder.exception


class Rank(Group):
    """One of several threads that act as processes of a run."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self._board, self._barrier = rank, size, board, barrier

    def gather(self, value):
        self._barrier.wait()
        self._board[self.rank] = copy.deepcopy(value)
        self._barrier.wait()
        return [self._board[rank] for rank in range(self.size)]

    def share(self, value):
        return self.gather(value)[0]

    def reduce(self, tensor, op="sum"):
        stacked = torch.stack(self.gather(tensor))
        return stacked.sum(0) if op == "sum" else stacked.amax(0)


def test_processes_measure_together_what_one_does(tiny, tmp_path, calibration, measured, monkeypatch):
    prepared = prepare(tiny("llama"), recipe={"calibration": calibration, "steps": [{"use": "quant.mixed", "with": OPTIONS}]})
    (step,) = prepared.plan.steps
    (tmp_path / "work").mkdir()
    board, barrier, lock = {}, threading.Barrier(3, timeout=120), threading.Lock()

    def built(*arguments):  # building a model changes torch for all threads
        with lock:
            made = Skeleton(*arguments)
        barrier.wait()
        return made

    monkeypatch.setattr(sensitivity, "Skeleton", built)

    def one(rank):
        context = Context(prepared.source, prepared.description, "cpu", 0, tmp_path / "work", batch_size=2, group=Rank(rank, 3, board, barrier))
        calibrate(prepared, context)
        return step.pass_.sensitivities(step.sites, context)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(one, range(3)))
    assert found[0] == found[1] == found[2]
    for unit in measured[1]["units"]:
        for name, loss in unit["kl"].items():
            assert found[0].units[unit["unit"]].kl[name] == pytest.approx(loss, rel=0.05), (unit["unit"], name)


@pytest.mark.parametrize("compensation", ["gptq", "gptaq"])
def test_one_candidate_is_its_own_pass(tiny, tmp_path, calibration, measured, compensation):
    run(tiny("llama"), tmp_path / "mixed", calibration, candidates=["int3"], compensation=compensation, sensitivity=str(measured[0]))
    step = {"use": f"quant.{compensation}", "with": {"bits": 3, "group_size": 16}}
    compress(tiny("llama"), out=tmp_path / "own", recipe={"calibration": calibration, "steps": [step]})
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mixed", "own")]
    assert files[0] == files[1]
