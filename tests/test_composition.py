"""Any two quantization passes: they either fit together, or are refused before anything is written."""

import itertools

import pytest

from angelslim_core.errors import PlanError, RecipeError
from angelslim_core.passes import TrainedPass, WeightPass
from angelslim_core.pipeline import compress, prepare
from angelslim_core.plugins import PluginHost
from angelslim_core.validation import validate

# sizes that divide the tiny model's dimensions, for whatever option carries such a name
SIZES = {"group_size": 32, "block_size": 32, "block_rows": 32, "block_columns": 32}


def found_passes():
    host = PluginHost()
    host.load(["quant"])
    found = {name: pass_ for name, pass_ in sorted(host.registry.passes.items()) if name.startswith("quant.")}
    return {name: pass_ for name, pass_ in found.items() if not issubclass(pass_, TrainedPass)}  # these need a third step, which trains


PASSES = found_passes()


def options_of(name, base):
    """Sizes that fit; a pass that reads another checkpoint gets `base`, and of its sizes that of its default format."""
    fields = PASSES[name].Config.model_fields
    if "base" in fields:
        return {"base": str(base), "block_size": 32}
    return {option: size for option, size in SIZES.items() if option in fields}


PAIRS = list(itertools.product(PASSES, repeat=2))
DISJOINT = (["attention"], ["mlp"])


def recipe(model, pair, text, targets=(None, None)):
    steps = []
    for name, chosen in zip(pair, targets, strict=True):
        steps.append({"use": name, "with": options_of(name, model), **({"targets": chosen} if chosen else {})})
    return {"steps": steps, "calibration": {"data": text, "samples": 2, "tokens": 16}}


def planned(model, *arguments):
    """The plan, or None where the pair is refused; any other error is raised."""
    try:
        return prepare(model, recipe=recipe(model, *arguments)).plan
    except (PlanError, RecipeError) as error:
        assert error.where and error.what
        return None


def layouts(pass_id, tiny_sites):
    """Layouts that hold what a pass writes; None for a pass that leaves weights in their dtype."""
    pass_class = PASSES[pass_id]
    if not issubclass(pass_class, WeightPass):
        return None
    schemes = [pass_class(pass_class.Config(**options_of(pass_id, "unread"))).scheme(site) for site in tiny_sites]
    return None if None in schemes else set.intersection(*(set(s.exporters) for s in schemes))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return str(file)


def run(model, out, *arguments):
    compress(model, out=out, recipe=recipe(model, *arguments))
    found = validate(out, model)
    assert found["ok"], found["problems"]


def shape_of(plan):
    """What decides how a run goes: kinds of its steps, its layout and which schemes it mixes."""
    kinds = tuple(step.pass_.kind.value for step in plan.steps)
    return kinds, plan.exporter.name if plan.exporter else None, len(set(plan.schemes.values()))


def test_two_quantizers_of_one_linear_are_refused(tiny, text):
    model = tiny()
    refused = 0
    for pair in PAIRS:
        writers = [n for n in pair if issubclass(PASSES[n], WeightPass) and "linear.weight" in PASSES[n](PASSES[n].Config(**options_of(n, model))).claims]
        plan = planned(model, pair, text)
        assert plan is None or len(writers) < 2, pair
        refused += plan is None
    assert refused


def test_disjoint_targets_fit_where_one_layout_holds_both(tiny, text):
    sites = prepare(tiny(), ["quant.int8_dynamic"]).plan.steps[0].sites
    held = {name: layouts(name, sites) for name in PASSES}
    for first, second in PAIRS:
        plan = planned(tiny(), (first, second), text, DISJOINT)
        one, other = held[first], held[second]
        if one is not None and other is not None:
            assert (plan is not None) == bool(one & other), (first, second)


def test_one_run_of_each_shape(tiny, tmp_path, text):
    done = {}
    for pair, targets in itertools.product(PAIRS, [(None, None), DISJOINT]):
        plan = planned(tiny(), pair, text, targets)
        if plan is not None and shape_of(plan) not in done:
            done[shape_of(plan)] = pair
            run(tiny(), tmp_path / f"out{len(done)}", pair, text, targets)
    assert len(done) >= 3


def test_a_refused_run_writes_nothing(tiny, tmp_path, text):
    pair = next(pair for pair in PAIRS if planned(tiny(), pair, text) is None)
    with pytest.raises((PlanError, RecipeError)):
        compress(tiny(), out=tmp_path / "out", recipe=recipe(tiny(), pair, text))
    assert not list(tmp_path.iterdir())
