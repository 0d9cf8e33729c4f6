"""The private folder beside the output: lock, journal, stage. The output appears by one rename, whole or not at all.

`.OUT.angelslim/` holds `manifest.json` (fingerprint of the run), `journal.jsonl` (finished layers and shards; of other
processes than the first `journal-RANK.jsonl`), `layers/`, `acts/` and `stage/`. A run that is killed leaves it behind; the same command finds it and goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from .errors import OutputError, RecipeError, ResourceError, StoppedError
from .io.writer import disk_error, disk_errors, fsync_folder, write_json


class Workdir:
    """Owner of an output while it is being made.

    Args:
        out: the folder to be published.
        source: the model folder, which must not lie in or under `out`; None: what is written comes from no folder.
        replace: an existing output may be replaced once the new one is complete.

    Raises:
        OutputError: the output exists, is locked by another run, or would overwrite the source.
    """

    def __init__(self, out: Path, source: Path | None, replace: bool) -> None:
        self.out = out.absolute()
        self.replace = replace
        self._kept: tuple[type[BaseException], ...] = (StoppedError, ResourceError, KeyboardInterrupt)
        real, home = self.out.resolve(), source.resolve() if source else None
        if home and (real == home or home.is_relative_to(real) or real.is_relative_to(home)):
            raise OutputError(1, str(out), "lies in the model folder or holds it", "choose another --out")
        self.path = _path(self.out)
        self._backup = self.out.parent / f".{self.out.name}.angelslim.old"
        if self._backup.exists():  # a crash within --replace
            if self.out.exists():
                shutil.rmtree(self._backup, ignore_errors=True)
            else:
                self._backup.rename(self.out)
        if self.out.exists() and not replace:
            self._refuse()

    def __enter__(self) -> Workdir:
        import filelock

        self._lock = filelock.FileLock(self.path / "lock")
        try:
            with disk_errors(self.path, 4096):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.mkdir(mode=0o700, exist_ok=True)
                self._lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = self.path / "owner"
            who = owner.read_text() if owner.is_file() else "unknown"
            raise OutputError(4, str(self.out), f"is being made by another run ({who})", "wait for it, or choose another --out") from None
        except OSError as error:
            raise OutputError(3, str(self.out), f"cannot be created: {error.strerror}") from error
        if self.out.exists() and not self.replace:  # another run published it before we had the lock
            self._lock.release()
            self._refuse()
        try:
            with disk_errors(self.path, 4096):
                self._lay_out()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _lay_out(self) -> None:
        # a new folder, one whose stage became the output before a crash, or one whose removal a crash cut short
        if not (self.stage.exists() and (self.path / "manifest.json").is_file()):
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "lock":
                    entry.unlink()
        (self.path / "owner").write_text(f"process {os.getpid()} on {socket.gethostname()}")
        for name in ("layers", "acts", "stage"):
            (self.path / name).mkdir(exist_ok=True)

    def _refuse(self) -> NoReturn:
        self._drop_published()
        raise OutputError(2, str(self.out), "exists", "choose another --out, or give --replace")

    def _drop_published(self) -> None:
        """Remove the work folder of a run that crashed between publishing its output and removing it."""
        import filelock

        if not self.path.is_dir() or self.stage.exists():
            return
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(self.path / "lock", timeout=0):
            shutil.rmtree(self.path, ignore_errors=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # keep only what another try can build on
        begun = any(any(self.path.glob(name)) for name in ("journal*.jsonl", "rewritten", "trained", "measured"))
        # what took hours is kept whatever goes wrong after it, a gate that fails for instance
        trained = any(any(self.path.glob(name)) for name in ("trained", "measured/*/step-*"))
        resumable = isinstance(error, _Unfinished) or trained or (begun and isinstance(error, self._kept))
        if kind is not None and not resumable:
            shutil.rmtree(self.path, ignore_errors=True)  # before another run may take the lock
        self._lock.release()

    @contextlib.contextmanager
    def keeping(self, kind: type[BaseException]) -> Iterator[None]:
        """After such an error inside, what was done is kept as well."""
        before = self._kept
        self._kept = (*before, kind)
        yield
        self._kept = before  # not after an error, which is on its way to `__exit__`

    @property
    def stage(self) -> Path:
        return self.path / "stage"

    def begin(self, fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Start or resume: the journal of an earlier run with the same fingerprint, else an empty one.

        Raises:
            RecipeError: an unfinished run of something else is in the way; names what differs.
        """
        manifest = self.path / "manifest.json"
        if manifest.is_file():
            earlier = json.loads(manifest.read_text())
            differing = sorted(k for k in fingerprint.keys() | earlier.keys() if fingerprint.get(k) != earlier.get(k))
            if differing:
                raise _Unfinished(90, str(self.out), f"an unfinished run with another {', '.join(differing)} is in the way",
                                  f"run that one again, or delete {self.path.name} beside the output")  # fmt: skip
            for unfinished in self.stage.rglob(".*.tmp"):  # would be taken for a part of the output
                unfinished.unlink()
            return read_journals(self.path)
        write_json(manifest, dict(fingerprint))
        return []

    def record(self, **entry: Any) -> None:
        """Append one finished item to the first process's journal, durably."""
        record(self.path, 0, entry)

    def publish(self) -> None:
        """Make the stage the output by one rename, then drop the work folder."""
        for path in sorted(self.stage.rglob("*"), reverse=True):
            if path.is_dir():
                fsync_folder(path)
        fsync_folder(self.stage)
        os.chmod(self.stage, 0o777 & ~_umask())
        if self.out.exists():
            self.out.rename(self._backup)
        self.stage.rename(self.out)
        fsync_folder(self.out.parent)
        shutil.rmtree(self._backup, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


class _Unfinished(RecipeError):
    """Raised before the work folder may be touched, so that it is kept."""


def record(folder: Path, rank: int, entry: Mapping[str, Any]) -> None:
    """Append one finished item to a process's journal in a work folder, durably.

    Raises:
        ResourceError: the disk is full.
    """
    try:
        with _journal(folder, rank).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(error, folder, 4096) from error


def read_journals(folder: Path) -> list[dict[str, Any]]:
    """What all processes recorded, however many they were; a line that a crash cut short is dropped, also from the file."""
    found = []
    for journal in sorted(folder.glob("journal*.jsonl")):
        entries = []
        text = journal.read_text(encoding="utf-8")
        for line in text.split("\n"):
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line a crash cut short, or the empty end
        kept = "".join(json.dumps(entry) + "\n" for entry in entries)
        if kept != text:
            with journal.open("w", encoding="utf-8") as stream:
                stream.write(kept)
        found += entries
    return found


def _journal(folder: Path, rank: int) -> Path:
    return folder / (f"journal-{rank}.jsonl" if rank else "journal.jsonl")


def is_unfinished(out: Path) -> bool:
    """Whether a run that was to make this folder was stopped or killed."""
    return _path(out.absolute()).exists()


def _path(out: Path) -> Path:
    return out.parent / f".{out.name}.angelslim"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return _hashed(path, hashlib.sha256())


def digest(path: Path) -> str:
    """Of a file that only this program reads: twice as fast as SHA-256 where the processor has no instructions for that."""
    return _hashed(path, hashlib.blake2b(digest_size=32))


def _hashed(path: Path, found: Any) -> str:
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return str(found.hexdigest())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
