"""Writing a cache, shard by shard; a killed writer goes on, and the folder appears when it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import RecipeError, StoppedError
from angelslim_core.io.checkpoint import read_bytes, read_header, torch_dtype
from angelslim_core.io.writer import write_tensors
from angelslim_core.workdir import Workdir

from ..targets import Batch, TopK
from .manifest import Manifest, Shard, write_manifest


@dataclass(frozen=True)
class _Row:
    """A sample as it is stored: its key, and its tensors [T, ...] but `lengths` and `keys`."""

    key: bytes
    tensors: dict[str, Tensor]


def write_cache(
    batch_of: Callable[[int], Batch], count: int, teacher: Callable[[Batch], TopK], manifest: Manifest, out: Path, *,
    batches_a_shard: int = 64, replace: bool = False, progress: Progress = silent, stop_requested: Callable[[], bool] = never,
) -> Manifest:  # fmt: skip
    """Write the distributions of all samples of some batches; a sample that occurs again is written once.

    Args:
        batch_of: batch_of(number) for numbers below `count`; `samples` are hex sha256.
        teacher: with `manifest.top_k` tokens a position.
        manifest: what is known before; shards and counts are added.

    Returns:
        the manifest as written.

    Raises:
        OutputError: the folder exists.
        RecipeError: an unfinished cache of something else is in the way, or there is no sample.
        StoppedError: it was asked to stop; finished shards are kept.
    """
    starts = range(0, count, batches_a_shard)
    with Workdir(out, None, replace) as work:
        journal = work.begin({"batches_a_shard": batches_a_shard, "batches": count, **manifest.model_dump(mode="json")})
        shards = [Shard.model_validate(entry["shard"]) for entry in journal if entry["shard"]]
        seen = {key for shard in shards for key in _keys(work.stage / shard.file)}
        for number in range(len(journal), len(starts)):
            rows: list[_Row] = []
            for at in range(starts[number], min(starts[number] + batches_a_shard, count)):
                batch = batch_of(at)
                if not all(bytes.fromhex(key) in seen for key in batch.samples):
                    rows += _new(_rows(batch, teacher(batch)), seen)
                progress(at + 1, count, f"{len(seen)} samples")
            shard = _write(work.stage / f"cache-{len(shards):05d}.safetensors", rows, manifest) if rows else None
            work.record(shard=shard and shard.model_dump())
            shards += [shard] if shard else []
            if stop_requested() and number + 1 < len(starts):
                raise StoppedError(930, str(out), f"stopped as asked after {number + 1} of {len(starts)} files", "run the same command again to go on")
        if not shards:
            raise RecipeError(930, str(out), "there is no sample to write", "give data that are not empty")
        totals = {"rows": sum(s.rows for s in shards), "positions": sum(s.positions for s in shards), "shards": shards}
        whole = manifest.model_copy(update=totals)
        write_manifest(work.stage, whole)
        work.publish()
    return whole


def _new(rows: Iterator[_Row], seen: set[bytes]) -> Iterator[_Row]:
    for row in rows:
        if row.key not in seen:
            seen.add(row.key)
            yield row


def _rows(batch: Batch, found: TopK) -> Iterator[_Row]:
    """The samples of a batch without their padding."""
    lengths = batch.attention_mask.sum(1).tolist()
    labels = batch.labels.clamp(min=-1)
    parts = {"ids": found.ids, "logp": found.logp, "label_logp": found.label_logp, "tokens": batch.input_ids, "labels": labels}
    host = {name: tensor.cpu() for name, tensor in parts.items()}
    for i, (key, length) in enumerate(zip(batch.samples, lengths, strict=True)):
        yield _Row(bytes.fromhex(key), {name: tensor[i, :length] for name, tensor in host.items()})


def _write(path: Path, rows: list[_Row], manifest: Manifest) -> Shard:
    positions = sum(len(row.tensors["tokens"]) for row in rows)
    specs = manifest.specs(len(rows), positions)
    tensors = {name: torch.cat([row.tensors[name] for row in rows]) for name in specs.keys() - {"lengths", "keys"}}
    tensors["lengths"] = torch.tensor([len(row.tensors["tokens"]) for row in rows])
    tensors["keys"] = torch.tensor([list(row.key) for row in rows], dtype=torch.uint8)
    nbytes = write_tensors(path, {name: tensor.to(torch_dtype(specs[name][0])) for name, tensor in tensors.items()})
    return Shard(file=path.name, nbytes=nbytes, rows=len(rows), positions=positions)


def _keys(path: Path) -> Iterator[bytes]:
    info = read_header(path)["keys"]
    data = read_bytes(info.file, info.offset, info.nbytes).numpy().tobytes()
    return (data[at : at + 32] for at in range(0, len(data), 32))
