"""Tensor passes over a checkpoint: read a unit, compress it, write it, forget it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .analysis import weight_numbers
from .errors import NumericError
from .exporters import Exporter
from .io.checkpoint import Checkpoint, read_header
from .io.writer import ShardWriter, shard_name
from .passes import TensorPass
from .schemes import Quantized
from .workdir import Workdir, sha256

if TYPE_CHECKING:
    from torch import Tensor

    from .adapters.base import Site
    from .context import Context
    from .plan import Plan, Unit

Item = TypeVar("Item")
Got = TypeVar("Got")


def write_shards(plan: Plan, context: Context, workdir: Workdir, journal: Iterable[Mapping[str, Any]], layers: Mapping[str, Path]) -> dict[str, Any]:
    """Write every shard of the output into the stage; shards the journal holds are kept.

    Args:
        layers: output tensor -> file in which the layer sweep left it.
    Returns:
        `weight_numbers` of each quantized linear.
    """
    metrics: dict[str, Any] = {}
    finished = {e["shard"]: e for e in journal if "shard" in e}
    total = sum(len(shard) for shard in plan.shards)
    done = 0
    store = _LayerStore(layers)
    for index, members in enumerate(plan.shards):
        name = shard_name(index, len(plan.shards))
        path = workdir.stage / name
        if name in finished and path.is_file() and sha256(path) == finished[name]["sha256"]:
            metrics.update(finished[name]["metrics"])
            done += len(members)
            continue
        units = [plan.units[i] for i in members]
        writer = ShardWriter(path, {n: spec for unit in units for n, spec in unit.outputs.items()})
        found: dict[str, Any] = {}
        try:
            for unit, weights in prefetch(units, lambda unit: _read(unit, plan, store, context)):
                context.check_stop(name)
                for tensor, value in _process(unit, weights, plan, context, found).items():
                    writer.write(tensor, value)
                done += 1
                context.progress(done, total, next(iter(unit.outputs)))
            writer.finish()
        except BaseException:
            writer.close()
            raise
        workdir.record(shard=name, sha256=sha256(path), metrics=found)
        metrics.update(found)
    return metrics


def prefetch(items: Iterable[Item], read: Callable[[Item], Got]) -> Iterator[tuple[Item, Got]]:
    """(item, read(item)) in order, reading one item ahead."""
    with ThreadPoolExecutor(1) as pool:
        pending: list[tuple[Item, Any]] = []
        for item in items:
            pending.append((item, pool.submit(read, item)))
            if len(pending) == 2:
                first, future = pending.pop(0)
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


class _LayerStore:
    """Tensors that the layer sweep left in its files."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self._open: dict[Path, Checkpoint] = {}

    def read(self, name: str) -> Tensor:
        path = self.files[name]
        if path not in self._open:
            self._open = {path: Checkpoint(path.parent, {}, read_header(path))}
        return self._open[path].read(name)


@dataclass
class _Read:
    """A unit as it was read.

    Args:
        finished: outputs by name, of a unit that is only written.
        weights: else by site.
        fetched: step -> what its pass reads beside them.
    """

    finished: Mapping[str, Tensor]
    weights: Mapping[Site, Tensor]
    fetched: Mapping[int, Mapping[Site, Tensor]]


def _read(unit: Unit, plan: Plan, store: _LayerStore, context: Context) -> _Read:
    stored = [name for name in unit.outputs if name in store.files]
    if stored:
        return _Read({name: store.read(name) for name in unit.outputs}, {}, {})
    if not unit.sites:
        (name,) = unit.tensors
        return _Read({name: plan.source.read(name)}, {}, {})
    swept = {site: f"{site.name}.weight" for site in unit.sites}  # parts of a stacked tensor that the sweep changed
    weights = {s: store.read(n) if n in store.files else plan.source.read(s.tensor, s.part) for s, n in swept.items()}
    return _Read({}, weights, {} if _is_swept(unit, plan) else fetch(unit, plan, context))


def _is_swept(unit: Unit, plan: Plan) -> bool:
    """Whether the layer sweep went over it; what it did not write, it left as it was."""
    return bool(plan.layer_steps) and unit.sites[0].layer is not None


def _process(unit: Unit, read: _Read, plan: Plan, context: Context, metrics: dict[str, Any]) -> dict[str, Tensor]:
    if read.finished:
        for name, tensor in read.finished.items():
            check_finite(name, tensor)
        return dict(read.finished)
    tensors = read.weights
    for site, weight in tensors.items():
        check_finite(site.tensor, weight)
    outputs: dict[str, Tensor] = {}
    for site, result in (tensors if _is_swept(unit, plan) else apply_steps(unit.steps, tensors, read.fetched, plan, context)).items():
        outputs.update(encode(site, result, tensors[site], plan.exporter, metrics))
    # a stacked tensor that keeps its form is transformed part by part
    if len(unit.outputs) == 1 and len(outputs) > 1 and unit.sites and unit.sites[0].part:
        (name,) = unit.outputs
        whole = plan.source.read(name)
        for site in unit.sites:
            part = site.part
            assert part
            target = whole[part.expert].T if part.transposed else whole[part.expert]
            target[part.start : part.stop].copy_(outputs[f"{site.name}.weight"])
        outputs = {name: whole}
    return outputs


def fetch(unit: Unit, plan: Plan, context: Context) -> dict[int, Mapping[Site, Tensor]]:
    """Step -> what its pass reads beside the weights of a unit."""
    found: dict[int, Mapping[Site, Tensor]] = {}
    for index in unit.steps:
        step = plan.steps[index]
        chosen = {site.name for site in step.sites}
        if isinstance(step.pass_, TensorPass):
            found[index] = step.pass_.fetch([s for s in unit.sites if s.name in chosen], context)
    return found


def apply_steps(
    steps: Iterable[int], weights: Mapping[Site, Tensor], fetched: Mapping[int, Mapping[Site, Tensor]], plan: Plan, context: Context
) -> dict[Site, Quantized | Tensor]:  # fmt: skip
    """Run the tensor passes of a unit in order over its weights."""
    current: dict[Site, Quantized | Tensor] = dict(weights)
    for index in steps:
        step = plan.steps[index]
        pass_ = step.pass_
        assert isinstance(pass_, TensorPass)
        chosen = {site.name for site in step.sites}
        inputs = {s: w for s, w in current.items() if s.name in chosen and not isinstance(w, Quantized)}
        moved = [{s: t.to(context.device) for s, t in found.items()} for found in (inputs, fetched[index])]
        current.update(pass_.apply_with(moved[0], moved[1], context))
    return current


def encode(site: Site, result: Quantized | Tensor, weight: Tensor, exporter: Exporter | None, metrics: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors to be written for one linear, after a check of its numbers.

    Raises:
        NumericError: a scale is zero or not finite, or the dequantized weight is not.
    """
    import torch

    if not isinstance(result, Quantized):
        check_finite(f"{site.name}.weight", result)
        return {f"{site.name}.weight": result}
    assert exporter
    scale = result.scale.float()
    if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
        raise NumericError(1, site.name, "got a scale that is zero or not finite")
    packed = exporter.pack(result)
    metrics[site.name] = weight_numbers(weight.to(result.codes.device), result, packed)
    return {f"{site.name}.{suffix}": tensor for suffix, tensor in packed.items()}


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericError if a floating-point tensor holds NaN or Inf."""
    import torch

    if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
        return
    # one pass without a mask the size of the tensor; NaN and Inf both survive the reduction
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise NumericError(3, name, "holds NaN or Inf", "the checkpoint is damaged; fetch it again")
