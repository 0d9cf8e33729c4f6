"""Layer passes: one sweep over the decoder layers, one layer resident, all steps of the recipe on each.

The inputs of layer 0 and the other arguments of every layer are captured by running the model with its layers replaced
by recorders. Each layer then runs on the outputs of the layers before it as they will be stored.

What a layer is fed lies in `acts/` for a resumed run and, but for a GPU that has room for it in page-locked memory, nowhere else: `LAYER-RANK` as the
compressed layers before it make it, `LAYER-RANK.reference` as the unchanged ones do, written a batch at a time by the
process that has the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .activations import Interned, Recording, stored
from .adapters.base import Site
from .analysis import LayerInputs, check_experts
from .calibration.data import batches
from .device import is_out_of_memory, map_large_pieces, release_ram, to_host
from .finished import Computed, Finished, resumable
from .io.checkpoint import read_header
from .layer import Layer, LayerBatch
from .model import Skeleton
from .passes import LayerPass, Pass, TensorPass
from .products import products
from .schemes import Quantized
from .stream import check_finite, encode
from .workdir import Workdir

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .context import Context
    from .plan import Plan, Step


# stands where samples are shorter than others of their batch
PAD = 0


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


class Layered(Protocol):
    """A model whose embeddings can be run: a `Skeleton`, or one that is whole.

    Attributes:
        backbone: what holds the decoder layers, as `layers`.
    """

    backbone: Any
    layers: nn.ModuleList


def capture(skeleton: Layered, context: Context, file: Path | None = None) -> list[list[LayerBatch]]:
    """Per layer this process's calibration batches; only those of layer 0 have hidden states, the other arguments are each layer's own.

    Args:
        file: where to keep the hidden states, instead of in memory.
    """
    import torch
    from torch import nn

    assert context.samples is not None
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    interned = Interned()
    layers = skeleton.layers
    skeleton.backbone.layers = nn.ModuleList([_recorder(layer, seen) for layer in layers])
    own = list(enumerate(batches(context.samples.ids, context.batch_size, PAD)))[context.group.rank :: context.group.size]
    captured = [[LayerBatch(None, batch.mask, number=number) for number, batch in own] for _ in layers]
    recording = Recording(file, captured[0]) if file else None
    try:
        with torch.no_grad(), products(context.device):
            for position, (number, batch) in enumerate(own):
                seen.clear()
                padded = not bool(batch.mask.all())
                skeleton.backbone(
                    input_ids=batch.input_ids.to(context.device),
                    attention_mask=batch.mask.to(context.device, torch.int64) if padded else None,
                    use_cache=False,
                )
                for index, (_, kwargs) in enumerate(seen):
                    captured[index][position].kwargs = interned(kwargs)
                hidden = to_host(seen[0][0])
                if recording:
                    recording.add(number, hidden)
                else:
                    captured[0][position].hidden = hidden
    finally:
        skeleton.backbone.layers = layers
        seen.clear()
    if recording:
        recording.finish()
        _load([recording.path], captured[0], spills=True)
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
        with products(hidden_NH.device.type):
            return skeleton.model(input_ids=input_ids_N[None], use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        skeleton.backbone.layers = layers


def run_sweep(
    plan: Plan, context: Context, workdir: Workdir | None, journal: Sequence[Mapping[str, Any]], run_pass: Callable[[Step, Callable[[], Any]], Any]
) -> Sweep:
    """Run the layer and tensor steps of a plan over all decoder layers.

    Args:
        workdir: of the first process, which writes what is finished; None in the others.
        run_pass: called with a step and a function that executes it on the layer at hand.
    """
    done = context.group.share(resumable(workdir, journal) if workdir else None)
    sweep = Sweep(resumed_layers=len(done))
    for entry in done:
        context.warnings += entry["warnings"]
        context.fallbacks += entry["fallbacks"]
        sweep.take(context, entry)
        check_experts(plan.recipe, entry)
    sweep.notes(context)
    if done:
        context.batch_size = done[-1]["batch_size"]
    while len(done) < plan.description.num_layers:
        try:
            _go_on(plan, context, workdir, done, sweep, run_pass)
        except (MemoryError, RuntimeError) as error:
            done[:] = [entry for entry in done if "acts" in entry]  # the disk may not have got the last one
            saving = _saving(context, error, bool(done))
            if saving is None:
                raise
            sweep.begin_again(context, f"layer {len(done)}: memory ran out, {saving}")
    return sweep


def _go_on(
    plan: Plan, context: Context, workdir: Workdir | None, done: list[dict[str, Any]], sweep: Sweep, run_pass: Callable[[Step, Callable[[], Any]], Any]
) -> None:  # fmt: skip
    """Run the layers after those that are done, which grow by them."""
    import torch

    map_large_pieces()
    skeleton = Skeleton(plan.source, plan.description)
    assert context.samples
    skeleton.fill_backbone(context.device, {PAD, *itertools.chain.from_iterable(context.samples.ids)})
    captured = capture(skeleton, context, _acts(context, 0) if context.spills and not done else None)
    skeleton.drop_backbone()
    release_ram()
    steps = [s for s in plan.steps if isinstance(s.pass_, (LayerPass, TensorPass))]
    if done:
        _load([context.workdir / name for name in done[-1]["acts"]], captured[len(done)], context.spills)
    elif _needs_reference(steps):
        for batch in captured[0]:
            batch.fork()
    with Finished(workdir, context.workdir, context.group, lambda entry: sweep.take(context, entry) if workdir else None) as finished:
        for index in range(len(done), plan.description.num_layers):
            context.check_stop(f"layer {index}")
            with torch.no_grad():
                computed = _run_layer(index, skeleton, plan, context, steps, captured, run_pass)
            check_experts(plan.recipe, computed.entry)
            computed.entry.update(sweep.notes(context))
            finished.add(computed)
            done.append(computed.entry)
            del computed
            context.progress(index + 1, plan.description.num_layers, f"layer {index}")


@dataclass
class Sweep:
    """Outcome of a sweep: where each finished tensor lies, and the numbers of the passes."""

    files: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    analysis: dict[int, dict[str, Any]] = field(default_factory=dict)
    reports: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    resumed_layers: int = 0
    said: tuple[int, int] = (0, 0)  # warnings and fallbacks up to the last finished layer
    again: list[str] = field(default_factory=list)  # why layers after it were begun again

    def notes(self, context: Context) -> dict[str, list[str]]:
        """Warnings and fallbacks since it was last asked for them, which is once a layer."""
        found = {"warnings": context.warnings[self.said[0] :], "fallbacks": context.fallbacks[self.said[1] :]}
        self.said, self.again = (len(context.warnings), len(context.fallbacks)), []
        return found

    def begin_again(self, context: Context, fallback: str) -> None:
        """Drop those notes, as the layer is done again, but for why it is."""
        self.again.append(fallback)
        del context.warnings[self.said[0] :]
        context.fallbacks[self.said[1] :] = self.again

    def take(self, context: Context, entry: Mapping[str, Any]) -> None:
        """Add a finished layer's journal entry."""
        path = context.workdir / entry["file"]
        self.files.update(dict.fromkeys(read_header(path), path))
        self.metrics.update(entry["metrics"])
        self.analysis[int(entry["layer"])] = entry["analysis"]
        for step, report in entry["reports"].items():
            self.reports.setdefault(int(step), []).append(report)


def _run_layer(
    index: int, skeleton: Skeleton, plan: Plan, context: Context, steps: Sequence[Step], captured: list[list[LayerBatch]],
    run_pass: Callable[[Step, Callable[[], Any]], Any],
) -> Computed:  # fmt: skip
    """Run the steps on a layer."""
    module = skeleton.fill_layer(index, context.device)
    prefix = f"{plan.description.block}.{index}."
    for name, tensor in module.state_dict().items():
        check_finite(prefix + name, tensor)
    layer = Layer(index, module, prefix, captured[index], context)
    if plan.trains_cache:
        _round_as_trained(layer, plan, context)
    reports: dict[str, Any] = {}
    files = [_acts(context, index + 1)]
    if _needs_reference(steps):
        files.append(_acts(context, index + 1, ".reference"))
        for _ in _outputs(layer, lambda batch: layer.forward(batch, batch.reference), files[1]):
            pass
        targets = stored(files[1:])
        for batch in layer.batches:
            batch.target = targets[batch.number]
    for step in steps:
        layer.sites = tuple(s for s in step.sites if s.layer == index)
        if layer.sites:
            reports[str(step.index)] = run_pass(step, lambda step=step: run_on_layer(step.pass_, layer))  # type: ignore[misc]
    outputs: dict[str, Tensor] = {}
    metrics: dict[str, Any] = {}
    for site, (result, weight) in layer.quantized.items():
        outputs.update({n: t.cpu().contiguous() for n, t in encode(site, result, weight, plan.exporter, metrics).items()})
    outputs.update({name: scale.cpu() for name, scale in layer.cache_scales.items()})
    done = {f"{site.name.removeprefix(prefix)}.weight" for site in layer.quantized}
    layer.quantized.clear()  # originals and codes
    kept = {name: tensor for name, tensor in module.state_dict().items() if name not in done}
    for name, tensor in skeleton.layer_tensors(index, kept):  # read again: a pass may have written into the one it was given
        if not _same(kept[name].cpu(), tensor.to(kept[name].dtype)):
            outputs[prefix + name] = kept[name].cpu().contiguous()
    release_ram()  # pages of the steps
    inputs = LayerInputs(layer)
    with inputs.watched():
        _advance(layer, inputs, captured[index + 1] if index + 1 < len(captured) else [], files)
    captured[index] = []
    skeleton.drop_layer(index)
    release_ram()
    return Computed(outputs, files, {
        "layer": index, "file": f"layers/{index:05d}.safetensors",
        "batch_size": context.batch_size, "metrics": metrics, "analysis": inputs.numbers(), "reports": reports,
    })  # fmt: skip


def _round_as_trained(layer: Layer, plan: Plan, context: Context) -> None:
    """Let the layer read keys and values as it did at the end of training, whatever its steps are."""
    from .fake_cache import read_trained_cache
    from .kv_cache import round_cache

    for name, site in plan.description.attentions.items():
        if site.layer == layer.index:
            round_cache(layer.attention(site), *read_trained_cache(context.workdir, name))


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


def _needs_reference(steps: Iterable[Step]) -> bool:
    return any(isinstance(s.pass_, LayerPass) and s.pass_.needs_reference for s in steps)


def _acts(context: Context, index: int, kind: str = "") -> Path:
    """The file of what this process's batches feed a layer."""
    return context.workdir / f"acts/{index:05d}-{context.group.rank}{kind}.safetensors"


def _outputs(layer: Layer, forward: Callable[[LayerBatch], Tensor], file: Path) -> Iterator[tuple[int, Tensor]]:
    """(position of a batch, what `forward` makes of it), each written to the file as it is made."""
    recording = Recording(file, layer.batches)
    try:
        for position, batch in enumerate(layer.batches):
            made = forward(batch)
            check_finite(f"output of layer {layer.index}", made)
            out = to_host(made)
            del made
            recording.add(batch.number, out)
            yield position, out
            del out  # else it is held during the next forward pass
    except BaseException:
        recording.close()
        raise
    recording.finish()


def _advance(layer: Layer, inputs: LayerInputs, following: Sequence[LayerBatch], files: Sequence[Path]) -> None:
    """Outputs of this layer become the inputs of the next, in their memory: pieces kept among freed ones would scatter the heap."""
    kept = not layer.context.spills
    for position, out in _outputs(layer, inputs.forward, files[0]):
        batch = layer.batches[position]
        if following and kept:
            following[position].hidden, following[position].reference = batch.hidden.copy_(out), batch.target
        batch.hidden = batch.reference = batch.target = None
        del out
    if not kept:
        _load(files, following, spills=True)


def _load(files: Iterable[Path], batches: Sequence[LayerBatch], spills: bool) -> None:
    """Give batches what they feed their layer; if it spills, it stays in the files."""
    for name in ("hidden", "reference"):
        found = stored([file for file in files if (".reference." in file.name) == (name == "reference")])
        for batch in batches if found else ():
            setattr(batch, name, found[batch.number] if spills else found[batch.number].read())


def _saving(context: Context, error: BaseException, has_begun: bool) -> str | None:
    """Change what saves memory, and say what; None if memory did not run out or nothing is left.

    Several processes would have to agree, and those that did not run out are in the middle of a layer.
    """
    if context.group.size > 1 or not is_out_of_memory(error):
        return None
    if context.batch_size > 1 and not has_begun:  # what is stored is in batches
        context.batch_size = (context.batch_size + 1) // 2
        return f"went on with {context.batch_size} samples a forward pass"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
