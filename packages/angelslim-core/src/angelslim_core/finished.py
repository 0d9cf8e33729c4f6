"""Finished layers on disk: written while the next one is computed, and found again by a resumed run.

A layer counts as finished once its tensors, what it feeds the next one and a line in the journal have reached the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from .io.writer import keep_tensors
from .workdir import Workdir, digest

if TYPE_CHECKING:
    from torch import Tensor

    from .parallel import Group


class Computed(NamedTuple):
    """A layer that is done, but not yet on disk.

    Args:
        outputs: its tensors.
        files: what this process's batches feed the next layer, already written.
        entry: of the journal; gets the digests of what is written.
    """

    outputs: Mapping[str, Tensor]
    files: Sequence[Path]
    entry: dict[str, Any]


class Finished:
    """Writes one layer behind; leaving the context waits for the last one. Of several processes all must have written theirs.

    Args:
        workdir: of the first process, which writes what is finished; None in the others.
        folder: the work folder.
        take: called with the entry of a layer that the disk has.
    """

    def __init__(self, workdir: Workdir | None, folder: Path, group: Group, take: Callable[[Mapping[str, Any]], None]) -> None:
        self._workdir, self._folder, self._group, self._take = workdir, folder, group, take
        self._thread = ThreadPoolExecutor(1)
        self._pending: tuple[dict[str, Any], Future[dict[str, str]]] | None = None

    def __enter__(self) -> Finished:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None or self._group.size == 1:  # others are not where they could exchange anything
                self.settle()
        finally:
            self._thread.shutdown()

    def add(self, layer: Computed) -> None:
        """Begin to write a layer, once the one before is finished."""
        self.settle()
        self._pending = layer.entry, self._thread.submit(self._write, layer)

    def settle(self) -> None:
        """Wait for what is being written."""
        if self._pending is None:
            return
        entry, written = self._pending
        self._pending = None
        own = written.result()
        if self._group.size > 1:
            self._record(entry, self._group.gather(own))
        self._take(entry)

    def _write(self, layer: Computed) -> dict[str, str]:
        if self._workdir:
            layer.entry["digest"] = _commit(self._folder / layer.entry["file"], layer.outputs)
        acts = {f"acts/{path.name}": digest(path) for path in layer.files}
        if self._group.size == 1:
            self._record(layer.entry, [acts])
        return acts

    def _record(self, entry: dict[str, Any], acts: Iterable[Mapping[str, str]]) -> None:
        entry["acts"] = {name: found for part in acts for name, found in part.items()}
        if self._workdir:
            self._workdir.record(**entry)
            for old in self._folder.glob(f"acts/{entry['layer'] - 1:05d}-*"):  # those of two layers are kept
                old.unlink()


def resumable(workdir: Workdir, journal: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Journal entries of the layers from the first on that need not be done again; hidden states are kept for the newest only."""
    entries = {int(e["layer"]): e for e in journal if "layer" in e}
    done: list[Mapping[str, Any]] = []
    while len(done) in entries and _is_intact(workdir, {entries[len(done)]["file"]: entries[len(done)]["digest"]}):
        done.append(entries[len(done)])
    while done and not _is_intact(workdir, done[-1]["acts"]):
        done.pop()
    return done


def _commit(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a file that is complete or absent; returns its digest."""
    keep_tensors(path, tensors)
    return digest(path)


def _is_intact(workdir: Workdir, files: Mapping[str, str]) -> bool:
    """Whether each file is there and has its digest."""
    return all((workdir.path / name).is_file() and digest(workdir.path / name) == found for name, found in files.items())
