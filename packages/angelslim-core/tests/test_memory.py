"""Short memory changes how a run goes about its work, never what it makes."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from angelslim_core import LayerPass, PluginHost, compress, hookimpl, pipeline
from angelslim_core import plan as planning
from angelslim_core.activations import Stored
from angelslim_core.adapters import builtin_layouts
from angelslim_core.calibration.data import Samples
from angelslim_core.context import Context
from angelslim_core.errors import ResourceError, StoppedError
from angelslim_core.layer import Layer
from angelslim_core.model import Skeleton, parameters_on_meta
from angelslim_core.pipeline import prepare
from angelslim_core.source import describe_source, open_source
from angelslim_core.sweep import PAD, capture

SAMPLES = ["calibration.samples=6", "calibration.tokens=16"]


class Drift(LayerPass):
    """Adds to every weight what depends on all that a batch holds."""

    id = "toy.drift"
    needs_reference = True
    seen: ClassVar[list] = []

    def run(self, layer):
        self.seen.append({type(vars(batch)[name]) for batch in layer.batches for name in ("_hidden", "_reference")})
        layer.context.fallbacks.append(f"layer {layer.index} drifted")
        with torch.no_grad():
            drift = [(layer.forward(b) - b.target).abs().mean() + (b.hidden - b.reference).abs().mean() for b in layer.batches]
            for site in layer.sites:
                linear = layer.linear(site)
                linear.weight.data = linear.weight * (1.01 + torch.stack(drift).mean().clamp_max(0.1))
        return {}


@hookimpl
def angelslim_register_passes():
    return [Drift]


@pytest.fixture
def run(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)

    def make(out, *overrides, **more):
        host = PluginHost()
        host.register_module("toy", SimpleNamespace(__name__="toy", ANGELSLIM_HOOKS=1, angelslim_register_passes=angelslim_register_passes))
        Drift.seen.clear()
        arguments = {"use": ["toy.drift"], "plugins": ["toy"], "host": host, "device": "cpu", "overrides": [f"calibration.data={text}", *SAMPLES, *overrides]}
        if out is None:
            return prepare(tiny(dtype="float32", num_hidden_layers=3), **arguments).plan
        return compress(tiny(dtype="float32", num_hidden_layers=3), out=tmp_path / out, **arguments, **more)

    return make


@pytest.fixture
def in_memory(monkeypatch):
    """Says whether hidden states stay in memory, as a GPU's do where there is room; at first they do."""
    plain, held = planning._peak_ram, [True]
    monkeypatch.setattr(planning, "_peak_ram", lambda plan, device: (plain(plan, device)[0], not held[0]))
    return held


def weights(result):
    return (result.path / "model.safetensors").read_bytes()


def test_hidden_states_in_files_give_the_same_bytes(run, in_memory):
    plain = run("memory")
    assert Drift.seen == [{torch.Tensor}] * 3
    in_memory[0] = False
    assert weights(run("files")) == weights(plain)
    assert Drift.seen == [{Stored}] * 3


def test_max_ram_decides_where_hidden_states_of_a_gpu_are(run, monkeypatch):
    many = ("calibration.samples=4096", "calibration.tokens=2048")  # two streams of 2 GB
    cpu = run(None, *many, "runtime.max_ram=64GB")
    monkeypatch.setattr(pipeline, "pick_device", lambda name: "cuda")
    small, large = run(None, *many, "runtime.max_ram=1GB"), run(None, *many, "runtime.max_ram=64GB")
    for plan in (cpu, small):
        assert plan.spills and plan.peak_ram_bytes < 1e9 and plan.as_dict()["hidden_states"] == "files"
    assert not large.spills and large.peak_ram_bytes > 4e9
    monkeypatch.setattr(planning, "free_ram_bytes", lambda: 1)
    assert run(None).spills


@pytest.mark.parametrize("first_in_files", [True, False])
def test_a_stopped_run_goes_on_wherever_its_hidden_states_are(run, in_memory, first_in_files):
    whole = run("whole")
    in_memory[0] = not first_in_files
    with pytest.raises(StoppedError):
        run("out", stop_requested=lambda: len(Drift.seen) == 2)
    in_memory[0] = first_in_files
    resumed = run("out")
    assert resumed.resumed_layers == 2 and weights(resumed) == weights(whole)
    assert resumed.fallbacks == whole.fallbacks == [f"layer {i} drifted" for i in range(3)]


def test_hidden_states_of_three_layers_are_kept_at_most(run, tmp_path):
    kept = []
    run("out", progress=lambda done, total, label: kept.append({int(p.name[:5]) for p in tmp_path.glob(".out.angelslim/acts/*")}))
    for done, layers in enumerate(kept[:3], 1):  # the newest is written while the next is computed
        assert {done - 1, done} <= layers <= {done - 2, done - 1, done}


FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory")


def failing(monkeypatch, when, error=FULL):
    """Layers run out of memory when when(batch) says so."""
    plain = Layer.forward

    def forward(layer, batch, *args, **kwargs):
        if when(layer, batch):
            raise error
        return plain(layer, batch, *args, **kwargs)

    monkeypatch.setattr(Layer, "forward", forward)


def test_smaller_batches_come_first(run, monkeypatch):
    plain = run("plain", "calibration.batch_size=1")
    failing(monkeypatch, lambda layer, batch: batch.mask.shape[0] > 1)
    result = run("out", "calibration.batch_size=4")
    assert weights(result) == weights(plain)
    lines = [f"layer 0: memory ran out, went on with {n} samples a forward pass" for n in (2, 1)]
    assert result.fallbacks == [*lines, *plain.fallbacks]


def test_batches_stay_as_finished_layers_had_them(run, monkeypatch):
    plain = run("plain", "calibration.batch_size=2")
    failing(monkeypatch, lambda layer, batch: layer.index == 0 and batch.mask.shape[0] > 2)
    with pytest.raises(StoppedError):
        run("out", "calibration.batch_size=4", stop_requested=lambda: bool(Drift.seen) and len(Drift.seen) == 1)
    result = run("out", "calibration.batch_size=4")
    assert result.resumed_layers == 1 and weights(result) == weights(plain)
    assert result.fallbacks == ["layer 0: memory ran out, went on with 2 samples a forward pass", *plain.fallbacks]


def test_in_the_end_it_is_an_error_and_finished_work_is_kept(run, monkeypatch, tmp_path):
    failing(monkeypatch, lambda layer, batch: layer.index == 1)
    with pytest.raises(ResourceError, match="memory ran out at"):
        run("out", "calibration.batch_size=4")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run("out", "calibration.batch_size=4").resumed_layers == 1


def test_files_do_not_help_a_gpu(run, monkeypatch):
    failing(monkeypatch, lambda layer, batch: True, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ResourceError):
        run("out", "calibration.batch_size=2")
    assert len(Drift.seen) == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_5_moe_text"])
def test_embeddings_of_the_calibration_tokens_are_enough(tiny, architecture):
    source = open_source(tiny(architecture))
    description = describe_source(source, builtin_layouts())
    ids = [torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 5)]
    context = Context(source, description, "cpu", 0, source.checkpoint.folder, Samples(ids), batch_size=2)
    hidden = []
    for tokens in (None, {PAD, *ids[0], *ids[1]}):
        skeleton = Skeleton(source, description)
        skeleton.fill_backbone("cpu", tokens)
        hidden.append(capture(skeleton, context)[0][0].hidden)
    assert torch.equal(*hidden)
    assert skeleton.model.get_input_embeddings().weight.shape[0] == len({PAD, *ids[0], *ids[1]})


def test_weights_take_no_memory_while_a_model_is_built():
    with parameters_on_meta():
        linear = torch.nn.Linear(1 << 22, 1 << 22)  # 70 TB
        norm = torch.nn.BatchNorm1d(2)
    assert linear.weight.is_meta and norm.weight.is_meta and not norm.running_mean.is_meta
