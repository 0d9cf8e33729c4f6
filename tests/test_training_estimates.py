"""What training will take is told by what is trained: of memory and of disk, before any work."""

import math
import shutil

import pytest

from angelslim_core import compress
from angelslim_core.errors import ResourceError
from angelslim_core.pipeline import prepare
from angelslim_core.testing.training import chats


@pytest.fixture
def data(tmp_path):
    return str(chats(tmp_path / "chats.jsonl"))


def takes(model, *steps):
    plan = prepare(model, recipe={"steps": list(steps)}).plan
    return plan.training_bytes, {name: math.prod(shape) for name, shape in plan.source.shapes.items()}


def qad(data, **options):
    return {"use": "distill.qad", "with": {"data": data, "steps": 2, **options}}


def test_frozen_weights_take_neither_gradients_nor_states(tiny, data):
    model = tiny("llama", dtype="bfloat16")
    (memory, disk), numbers = takes(model, {"use": "quant.focus"}, qad(data))
    assert disk == 0 and memory == 2 * sum(numbers.values())


def test_what_is_trained_along_is_counted_and_no_more(tiny, data):
    model = tiny("llama", dtype="bfloat16")
    seq2 = {"use": "quant.seq2", "with": {"group_size": 32}}
    (memory, disk), numbers = takes(model, seq2, qad(data))
    along = sum(n for name, n in numbers.items() if name.endswith("_proj.weight"))
    assert memory == 2 * 2 * sum(numbers.values()) + 18 * along and disk == 26 * along
    (_, everything), _ = takes(model, seq2, qad(data, train="all"))
    assert everything == 26 * sum(numbers.values())
    (_, scales), _ = takes(model, seq2, qad(data, train="quantizers"))
    assert scales == 0
    norms = sum(n for name, n in numbers.items() if "norm" in name)
    (_, with_norms), _ = takes(model, seq2, qad(data, also=["norm"]))
    (_, norms_alone), _ = takes(model, seq2, qad(data, train="quantizers", also=["norm"]))
    (_, frozen), _ = takes(model, {"use": "quant.lsq", "with": {"group_size": 32}}, qad(data, also=["norm", "proj"]))
    assert with_norms == 26 * (along + norms) and norms_alone == frozen == 26 * norms and norms


def test_states_that_will_not_fit_the_disk_are_said_at_once(tiny, data, tmp_path, monkeypatch):
    model = tiny("llama", dtype="bfloat16")
    steps = [{"use": "quant.seq2", "with": {"group_size": 32}}, qad(data)]
    plan = prepare(model, recipe={"steps": steps}).plan
    free = int(1.1 * plan.bytes_after) + 2 * plan.bytes_before + plan.training_bytes[1] - 1
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(ResourceError, match="of disk"):
        compress(model, out=tmp_path / "out", recipe={"steps": steps})
    assert not (tmp_path / "out").exists()
