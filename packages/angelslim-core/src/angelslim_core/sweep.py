"""Layer passes: one sweep over the decoder layers, one layer resident, all steps of the recipe on each.

The inputs of layer 0 and the other arguments of every layer are captured by running the model with its layers replaced
by recorders. Each layer then runs on the outputs of the layers before it as they will be stored.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .activations import Interned
from .adapters.base import Site
from .analysis import LayerInputs, check_experts
from .calibration.data import batches
from .io.checkpoint import Checkpoint, TensorSpec, dtype_name, read_header
from .io.writer import ShardWriter, fsync_folder
from .layer import Layer, LayerBatch
from .model import Skeleton
from .passes import LayerPass, Pass, TensorPass
from .schemes import Quantized
from .stream import check_finite, encode
from .workdir import Workdir, sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .context import Context
    from .plan import Plan, Step


def _recorder(original: nn.Module, seen: list[tuple[Tensor, dict[str, Any]]]) -> nn.Module:
    """Stands in for a decoder layer while inputs are captured."""
    from torch import nn

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["original"] = original  # not registered: its parameters are on meta

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise AssertionError(f"{type(original).__name__} is called with positional arguments beyond the hidden states")
            seen.append((hidden, kwargs))
            return hidden

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.__dict__["original"], name)

    return Recorder()


def capture(skeleton: Skeleton, context: Context) -> list[list[LayerBatch]]:
    """Per layer this process's calibration batches; hidden states are those of layer 0, the other arguments each layer's own."""
    import torch
    from torch import nn

    assert context.samples is not None
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    interned = Interned()
    layers = skeleton.layers
    skeleton.backbone.layers = nn.ModuleList([_recorder(layer, seen) for layer in layers])
    captured: list[list[LayerBatch]] = [[] for _ in layers]
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches(context.samples.ids, context.batch_size, 0)):
                if number % context.group.size != context.group.rank:
                    continue
                seen.clear()
                padded = not bool(batch.mask.all())
                skeleton.backbone(
                    input_ids=batch.input_ids.to(context.device),
                    attention_mask=batch.mask.to(context.device, torch.int64) if padded else None,
                    use_cache=False,
                )
                for index, (hidden, kwargs) in enumerate(seen):
                    captured[index].append(LayerBatch(hidden.cpu(), batch.mask, interned(kwargs), number))
    finally:
        skeleton.backbone.layers = layers
    return captured


def logits_of(skeleton: Skeleton, input_ids_N: Tensor, hidden_NH: Tensor) -> Tensor:
    """[N, V]: what the model makes of the last layer's outputs; gradients reach them.

    Args:
        input_ids_N: any tokens; they count for nothing.
    """
    from torch import nn

    layers = skeleton.layers
    stand_ins = [_recorder(layer, []) for layer in layers]
    stand_ins[-1].register_forward_hook(lambda *_: hidden_NH[None])
    skeleton.backbone.layers = nn.ModuleList(stand_ins)
    try:
        return skeleton.model(input_ids=input_ids_N[None], use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        skeleton.backbone.layers = layers


def run_sweep(
    plan: Plan, context: Context, workdir: Workdir, journal: Sequence[Mapping[str, Any]], run_pass: Callable[[Step, Callable[[], Any]], Any]
) -> Sweep:
    """Run the layer and tensor steps of a plan over all decoder layers.

    Args:
        run_pass: called with a step and a function that executes it on the layer at hand.
    """
    import torch

    skeleton = Skeleton(plan.source, plan.description)
    skeleton.fill_backbone(context.device)
    captured = capture(skeleton, context)
    skeleton.drop_backbone()
    for batch in itertools.chain.from_iterable(captured[1:]):
        batch.hidden = None
    if any(isinstance(s.pass_, LayerPass) and s.pass_.needs_reference for s in plan.steps):
        for batch in captured[0]:
            batch.reference = batch.hidden
    sweep = Sweep()
    finished = {int(e["layer"]): e for e in journal if "layer" in e}
    first = 0
    while first in finished and _intact(workdir, finished[first], "file", "sha256"):
        first += 1
    while first and not _intact(workdir, finished[first - 1], "acts", "acts_sha256"):
        first -= 1  # activations are kept for the newest layers only
    for index in range(first):
        sweep.take(workdir.path / finished[index]["file"], finished[index])
        check_experts(plan.recipe, finished[index])
    sweep.resumed_layers = first
    if first:
        _load_hidden(workdir.path / finished[first - 1]["acts"], captured)
    steps = [s for s in plan.steps if isinstance(s.pass_, (LayerPass, TensorPass))]
    for index in range(first, plan.description.num_layers):
        context.check_stop(f"layer {index}")
        with torch.no_grad():
            entry = _run_layer(index, skeleton, plan, context, steps, captured, workdir, run_pass)
        workdir.record(**entry)
        sweep.take(workdir.path / entry["file"], entry)
        check_experts(plan.recipe, entry)
        old = workdir.path / f"acts/{index - 2:05d}.safetensors"
        old.unlink(missing_ok=True)
        context.progress(index + 1, plan.description.num_layers, f"layer {index}")
    return sweep


@dataclass
class Sweep:
    """Outcome of a sweep: where each finished tensor lies, and the numbers of the passes."""

    files: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    analysis: dict[int, dict[str, Any]] = field(default_factory=dict)
    reports: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    resumed_layers: int = 0

    def take(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Add a finished layer's journal entry."""
        self.files.update(dict.fromkeys(read_header(path), path))
        self.metrics.update(entry["metrics"])
        self.analysis[int(entry["layer"])] = entry["analysis"]
        for step, report in entry["reports"].items():
            self.reports.setdefault(int(step), []).append(report)


def _run_layer(
    index: int, skeleton: Skeleton, plan: Plan, context: Context, steps: Sequence[Step], captured: list[list[LayerBatch]],
    workdir: Workdir, run_pass: Callable[[Step, Callable[[], Any]], Any],
) -> dict[str, Any]:  # fmt: skip
    module = skeleton.fill_layer(index, context.device)
    prefix = f"{plan.description.block}.{index}."
    for name, tensor in module.state_dict().items():
        check_finite(prefix + name, tensor)
    layer = Layer(index, module, prefix, captured[index], context)
    for batch in layer.batches:
        if batch.reference is not None:
            batch.target = layer.forward(batch, batch.reference).cpu()
    reports: dict[str, Any] = {}
    for step in steps:
        layer.sites = tuple(s for s in step.sites if s.layer == index)
        if layer.sites:
            reports[str(step.index)] = run_pass(step, lambda step=step: run_on_layer(step.pass_, layer))  # type: ignore[misc]
    outputs: dict[str, Tensor] = {}
    metrics: dict[str, Any] = {}
    for site, (result, weight) in layer.quantized.items():
        outputs.update({n: t.cpu().contiguous() for n, t in encode(site, result, weight, plan.exporter, metrics).items()})
    done = {f"{site.name.removeprefix(prefix)}.weight" for site in layer.quantized}
    kept = {name: tensor for name, tensor in module.state_dict().items() if name not in done}
    for name, tensor in skeleton.layer_tensors(index, kept):  # read again: a pass may have written into the one it was given
        if not _same(kept[name].cpu(), tensor.to(kept[name].dtype)):
            outputs[prefix + name] = kept[name].cpu().contiguous()
    inputs = LayerInputs(layer)
    with inputs.watched():
        _advance(layer, captured, index, inputs)
    skeleton.drop_layer(index)
    file, acts = f"layers/{index:05d}.safetensors", f"acts/{index:05d}.safetensors"
    hashes = [_commit(workdir.path / file, outputs), _commit(workdir.path / acts, _hidden(captured, index))]
    return {
        "layer": index, "file": file, "sha256": hashes[0], "acts": acts, "acts_sha256": hashes[1],
        "metrics": metrics, "analysis": inputs.numbers(), "reports": reports,
    }  # fmt: skip


def run_on_layer(pass_: Pass, layer: Layer) -> Mapping[str, Any]:
    """Run a layer or tensor pass on `layer.sites`; returns numbers for the report."""
    if isinstance(pass_, LayerPass):
        return dict(pass_.run(layer))
    assert isinstance(pass_, TensorPass)
    groups: dict[str, list[Site]] = {}
    for site in layer.sites:
        groups.setdefault(site.fused if pass_.joins_fused and site.fused else site.name, []).append(site)
    for members in groups.values():
        for site, result in pass_.apply({s: layer.linear(s).weight.data for s in members}, layer.context).items():
            if isinstance(result, Quantized):
                layer.store(site, result)
            else:
                layer.linear(site).weight.data = result
    return {}


def _advance(layer: Layer, captured: list[list[LayerBatch]], index: int, inputs: LayerInputs) -> None:
    """Outputs of this layer become the inputs of the next."""
    for position, batch in enumerate(layer.batches):
        out = inputs.forward(batch).cpu()
        check_finite(f"output of layer {index}", out)
        if index + 1 < len(captured):
            captured[index + 1][position].hidden = out
            captured[index + 1][position].reference = batch.target
    captured[index] = []


def _hidden(captured: list[list[LayerBatch]], index: int) -> dict[str, Tensor]:
    following = captured[index + 1] if index + 1 < len(captured) else []
    hidden = {f"{i:06d}": batch.hidden.contiguous() for i, batch in enumerate(following)}
    return hidden | {f"r{i:06d}": b.reference.contiguous() for i, b in enumerate(following) if b.reference is not None}


def _load_hidden(path: Path, captured: list[list[LayerBatch]]) -> None:
    index = int(path.stem) + 1
    if index < len(captured):
        store = Checkpoint(path.parent, {}, read_header(path))
        for i, batch in enumerate(captured[index]):
            batch.hidden = store.read(f"{i:06d}")
            batch.reference = store.read(f"r{i:06d}") if f"r{i:06d}" in store.tensors else None


def _commit(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a file that is complete or absent; returns its sha256."""
    temporary = path.with_suffix(".tmp")
    writer = ShardWriter(temporary, {n: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    os.replace(temporary, path)
    fsync_folder(path.parent)
    return sha256(path)


def _intact(workdir: Workdir, entry: Mapping[str, Any], file: str, digest: str) -> bool:
    path = workdir.path / str(entry[file])
    return path.is_file() and sha256(path) == entry[digest]


def _same(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
