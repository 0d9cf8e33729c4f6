"""Writing a target's features, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from angelslim_core.calibration.packing import Row, chunks
from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import StoppedError
from angelslim_core.workdir import Workdir

from ..data.shards import Manifest, Shard, write_manifest, write_shard
from .features import computed

if TYPE_CHECKING:
    from ..target import Target


def dump(
    target: Target, rows: Sequence[Row], manifest: Manifest, out: Path, *, batch: int = 1, shard_tokens: int = 1 << 16, replace: bool = False,
    progress: Progress = silent, stop_requested: Callable[[], bool] = never,
) -> Manifest:  # fmt: skip
    """Write the features of all rows into a folder, which appears when it is complete.

    Args:
        manifest: what is known before; shards and counts are added.
        batch: rows that the target reads at once.
        shard_tokens: of a file, unless one row is longer.

    Raises:
        OutputError: the folder exists.
        StoppedError: the run was asked to stop; finished shards are kept.
    """
    read = computed(target, rows, manifest.layer_ids)
    parts = _parts(rows, shard_tokens)
    with Workdir(out, None, replace) as work:
        journal = work.begin({"shard_tokens": shard_tokens, **manifest.model_dump(mode="json")})
        shards = [Shard.model_validate(entry) for entry in journal]
        for number, part in enumerate(parts[len(shards) :], len(shards)):
            features = [f for numbers in chunks(part, batch) for f in read(numbers)]
            found = write_shard(work.stage, number, [rows[i] for i in part], [aux.cpu() for aux, _ in features], [final.cpu() for _, final in features])
            work.record(**found.model_dump())
            shards.append(found)
            progress(number + 1, len(parts), f"{sum(s.tokens for s in shards)} tokens")
            if stop_requested() and number + 1 < len(parts):
                raise StoppedError(4, str(out), f"stopped as asked after {number + 1} of {len(parts)} files", "run the same command again to go on")
        whole = manifest.model_copy(update={"tokens": sum(s.tokens for s in shards), "rows": len(rows), "shards": shards})
        write_manifest(work.stage, whole)
        work.publish()
    return whole


def _parts(rows: Sequence[Row], most: int) -> list[list[int]]:
    """Numbers of consecutive rows, of at most so many tokens."""
    parts: list[list[int]] = []
    filled = most
    for i, row in enumerate(rows):
        if filled + len(row) > most:
            parts.append([])
            filled = 0
        parts[-1].append(i)
        filled += len(row)
    return parts
