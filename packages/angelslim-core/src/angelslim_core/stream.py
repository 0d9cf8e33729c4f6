"""Tensor passes over a checkpoint: read a unit, compress it, write it, forget it.

While a unit is computed the next one is read and the one before written; a full shard is flushed and hashed while the
next one is made. Of several processes each makes whole shards: the disk is what they share, and journal and checksums
know files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .analysis import weight_numbers
from .device import Worker, peaks, take_over
from .errors import NumericError, ResourceError
from .exporters import Exporter
from .io.checkpoint import Checkpoint, read_header
from .io.writer import ShardWriter, shard_name, spec_bytes
from .passes import TensorPass
from .schemes import Quantized
from .workdir import read_journals, record, sha256

if TYPE_CHECKING:
    from torch import Tensor

    from .adapters.base import Site
    from .context import Context
    from .io.checkpoint import TensorSpec
    from .plan import Plan, Unit

Item = TypeVar("Item")
Got = TypeVar("Got")

# shards flushed and hashed at a time, beside the one that is made; one core hashes 0.5 to 2 GB/s
FINISHING = 2
# bytes of a shard after which it is flushed in between, so that its end does not wait for all of it
FLUSHED = 256 << 20


@dataclass
class Written:
    """The shards of an output.

    Args:
        digests: file name -> SHA-256.
        metrics: `weight_numbers` of each quantized linear.
        peaks: most bytes of RAM and of a GPU that a process took.
    """

    digests: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    peaks: Sequence[int] = (0, 0)


def write_shards(plan: Plan, context: Context, journal: Iterable[Mapping[str, Any]], layers: Iterable[Path]) -> Written:
    """Write the shards of the output into the stage, each process its share; shards the journal holds are kept.

    Warnings and fallbacks of all processes are in `context` of the first one afterwards.

    Args:
        journal: of an unfinished run, as the first process has it.
        layers: files in which the layer sweep left tensors, likewise.
    Returns:
        all shards; the numbers are known to the first process only.
    Raises:
        ResourceError: not all were written.
    """
    group = context.group
    said = len(context.warnings), len(context.fallbacks)
    known: dict[str, list[str]] = {}
    for entry in journal:
        if "shard" in entry:
            known.setdefault(entry["shard"], []).append(entry["sha256"])
    known, files = group.share([known, [str(path.relative_to(context.workdir)) for path in layers]])
    digests = _write_share(plan, context, known, _LayerStore(context.workdir / name for name in files))
    found = group.gather([digests, peaks()])  # raises what ended another process
    written = Written({n: digest for own, _ in found for n, digest in own.items()}, {}, [*map(max, zip(*(peak for _, peak in found), strict=True))])
    if len(written.digests) < len(plan.shards):  # processes that no longer hear of each other stop
        raise ResourceError(464, "torchrun", "the processes of this run lost their connection", "run the same command again to go on")
    if group.rank == 0:
        del context.warnings[said[0] :], context.fallbacks[said[1] :]
        entries = {e["shard"]: e for e in read_journals(context.workdir) if "shard" in e and e["sha256"] == written.digests.get(e["shard"])}
        for name in _names(plan):
            written.metrics.update(entries[name]["metrics"])
            for line in entries[name]["warnings"]:
                context.warnings += [] if line in context.warnings else [line]
            context.fallbacks += entries[name]["fallbacks"]
    return written


def _names(plan: Plan) -> list[str]:
    return [shard_name(index, len(plan.shards)) for index in range(len(plan.shards))]


def spread(costs: Mapping[int, int], processes: int) -> list[list[int]]:
    """Which of them each process takes: the most costly first, each to the one that has least to do; in ascending order."""
    loads, shares = [0] * processes, [list[int]() for _ in range(processes)]
    for index in sorted(costs, key=lambda index: (-costs[index], index)):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        shares[least].append(index)
    return [sorted(share) for share in shares]


def _write_share(plan: Plan, context: Context, known: Mapping[str, Sequence[str]], store: _LayerStore) -> dict[str, str]:
    """Write this process's shards; returns the SHA-256 of those that are complete: all, unless another process has failed."""
    group, names, stage = context.group, _names(plan), context.workdir / "stage"
    costs = {index: _cost(plan, index) for index in range(len(names))}
    kept = spread({i: cost for i, cost in costs.items() if names[i] in known}, group.size)[group.rank]
    mine = spread({i: cost for i, cost in costs.items() if names[i] not in known}, group.size)[group.rank]
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(FINISHING) as pool:
        found = pool.map(lambda path: sha256(path) if path.is_file() else "", [stage / names[index] for index in kept])
        digests.update({names[index]: digest for index, digest in zip(kept, found, strict=True) if digest in known[names[index]]})
    mine += [index for index in kept if names[index] not in digests]
    done = sum(len(plan.shards[index]) for index in kept if index not in mine)
    units = [plan.units[i] for index in mine for i in plan.shards[index]]
    total = done + len(units)
    reader = Worker(context.device)

    def read(unit: Unit) -> _Read:
        with reader.reading():
            return _read(unit, plan, store, context, reader)

    with _Behind(context, digests) as behind, closing(prefetch(units, read, reader.start)) as reads:
        for index in mine:
            shard = behind.begin(stage / names[index], {n: spec for i in plan.shards[index] for n, spec in plan.units[i].outputs.items()})
            for unit, weights in islice(reads, len(plan.shards[index])):
                context.check_stop(names[index])
                if group.is_over():
                    return digests
                behind.add(shard, _process(unit, weights, plan, context, shard.metrics))
                del weights
                done += 1
                context.progress(done, total, next(iter(unit.outputs)))
            behind.finish(shard)
    return digests


def _cost(plan: Plan, index: int) -> int:
    """Bytes read and written for a shard."""
    units = [plan.units[i] for i in plan.shards[index]]
    read = sum(plan.source.nbytes(name) for unit in units for name in unit.tensors)
    return read + sum(spec_bytes(spec) for unit in units for spec in unit.outputs.values())


class _Shard:
    """A shard that is being made.

    Args:
        metrics: of its linears.
        said: warnings and fallbacks before it.
        wrote: the last unit's tensors are in the file.
        flushed: what was written by then is on the disk.
        unflushed: bytes written since.
    """

    def __init__(self, writer: ShardWriter, said: tuple[int, int]) -> None:
        self.writer, self.said = writer, said
        self.metrics: dict[str, Any] = {}
        self.wrote: Future[None] | None = None
        self.flushed: Future[None] | None = None
        self.unflushed = 0


class _Behind:
    """Writes one unit behind, and flushes, hashes and records full shards behind that; leaving the context waits for all.

    Args:
        digests: name of each finished shard -> SHA-256.
    """

    def __init__(self, context: Context, digests: dict[str, str]) -> None:
        self._context, self._digests = context, digests
        self._worker = Worker(context.device)
        self._writing = ThreadPoolExecutor(1, initializer=self._worker.start)
        self._flushing = ThreadPoolExecutor(1)
        self._finishing = ThreadPoolExecutor(FINISHING)
        self._wrote: Future[None] | None = None
        self._finished: deque[Future[None]] = deque()
        self._shards: list[_Shard] = []
        self._lock = Lock()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            for pool in (self._writing, self._finishing, self._flushing):
                pool.shutdown()
            for shard in self._shards:
                shard.writer.close()

    def begin(self, path: Path, specs: Mapping[str, TensorSpec]) -> _Shard:
        """Create a shard's file; its units follow, then `finish`."""
        self._settle(FINISHING)
        shard = _Shard(ShardWriter(path, specs), (len(self._context.warnings), len(self._context.fallbacks)))
        self._shards.append(shard)
        return shard

    def add(self, shard: _Shard, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write a unit, once the one before is written."""
        if self._wrote:
            self._wrote.result()
        self._wrote = shard.wrote = self._writing.submit(self._write, shard, tensors, self._worker.mark())

    def finish(self, shard: _Shard) -> None:
        """Complete a shard whose units have been added."""
        context = self._context
        notes = {"warnings": context.warnings[shard.said[0] :], "fallbacks": context.fallbacks[shard.said[1] :]}
        self._finished.append(self._finishing.submit(self._finish, shard, notes))

    def _settle(self, most: int) -> None:
        """Wait until at most so many shards are to be finished."""
        while self._finished and (len(self._finished) > most or self._finished[0].done()):
            self._finished.popleft().result()

    def _write(self, shard: _Shard, tensors: Mapping[str, Tensor], computed: Any) -> None:
        for name, tensor in tensors.items():
            shard.writer.write(name, self._worker.to_host(tensor, computed))
            shard.unflushed += tensor.nbytes
        if shard.unflushed >= FLUSHED and (shard.flushed is None or shard.flushed.done()):
            if shard.flushed:  # the system says only once what failed
                shard.flushed.result()
            shard.unflushed, shard.flushed = 0, self._flushing.submit(shard.writer.flush)

    def _finish(self, shard: _Shard, notes: Mapping[str, Any]) -> None:
        if shard.wrote:
            shard.wrote.result()
        if shard.flushed:  # the last write may have begun it
            shard.flushed.result()
        shard.writer.finish()
        path = shard.writer.path
        digest = sha256(path)
        with self._lock:
            record(self._context.workdir, self._context.group.rank, {"shard": path.name, "sha256": digest, "metrics": shard.metrics, **notes})
        self._digests[path.name] = digest
        self._shards.remove(shard)


def prefetch(items: Iterable[Item], read: Callable[[Item], Got], start: Callable[[], None] | None = None) -> Generator[tuple[Item, Got]]:
    """(item, read(item)) in order, reading one item ahead in a thread that begins with `start`."""
    with ThreadPoolExecutor(1, initializer=start) as pool:
        pending: deque[tuple[Item, Future[Got]]] = deque()
        for item in items:
            pending.append((item, pool.submit(read, item)))
            if len(pending) == 2:
                yield _awaited(pending)
        while pending:
            yield _awaited(pending)


def _awaited(pending: deque[tuple[Item, Future[Got]]]) -> tuple[Item, Got]:
    item, future = pending.popleft()  # in a frame of its own: what was read is freed when its user is done
    return item, future.result()


class _LayerStore:
    """Tensors that the layer sweep left in files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = {name: path for path in files for name in read_header(path)}
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


def _read(unit: Unit, plan: Plan, store: _LayerStore, context: Context, worker: Worker) -> _Read:
    stored = [name for name in unit.outputs if name in store.files]
    if stored:
        return _Read({name: store.read(name) for name in unit.outputs}, {}, {})
    if not unit.sites:
        (name,) = unit.tensors
        return _Read({name: plan.source.read(name)}, {}, {})
    swept = {site: f"{site.name}.weight" for site in unit.sites}  # parts of a stacked tensor that the sweep changed
    weights = {s: store.read(n) if n in store.files else plan.source.read_near(s.tensor, s.part, worker.device) for s, n in swept.items()}
    if _is_swept(unit, plan):
        return _Read({}, weights, {})
    fetched = fetch(unit, plan, context)
    return _Read({}, worker.to_device(weights), {index: worker.to_device(found) for index, found in fetched.items()})


def _is_swept(unit: Unit, plan: Plan) -> bool:
    """Whether the layer sweep went over it; what it did not write, it left as it was."""
    return bool(plan.layer_steps) and unit.sites[0].layer is not None


def _process(unit: Unit, read: _Read, plan: Plan, context: Context, metrics: dict[str, Any]) -> dict[str, Tensor]:
    if read.finished:
        for name, tensor in read.finished.items():
            check_finite(name, tensor)
        return dict(read.finished)
    tensors = read.weights
    for found in (tensors, *read.fetched.values()):
        take_over(found.values())
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
        moved = [{s: t.to(context.device) for s, t in found.items()} for found in (inputs, fetched[index])]  # an earlier step's may be elsewhere
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
    metrics[site.name] = {**weight_numbers(weight.to(result.codes.device), result, packed), **result.numbers}
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
