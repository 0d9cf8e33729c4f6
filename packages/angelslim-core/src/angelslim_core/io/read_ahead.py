"""The first part of a checkpoint goes into the system's file cache while the program starts.

Loading torch and waking a GPU take seconds in which the disk would rest. What is read here is read from memory when its
turn comes; nothing comes twice from the disk, as long as the system keeps it. Only Linux sends files to nowhere; elsewhere
nothing is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from types import TracebackType

from ..errors import AngelslimError
from .checkpoint import READERS, inside

# bytes read ahead at most; a start takes seconds, and a disk reads some GB in them
MOST = 8 << 30
BLOCK = 16 << 20


class ReadAhead:
    """Reads on until the context is left.

    Args:
        most: bytes, and `MOST` if that is less.
    """

    def __init__(self, most: int) -> None:
        self._most = min(most, MOST)
        self._started = False
        self._stop = Event()
        self._pool = ThreadPoolExecutor(READERS, "read-ahead")

    def start(self, folder: str | Path | None) -> None:
        """Begin, once, with the weight files of a model folder, by name; what is wrong with them is left to whoever opens them next."""
        if folder is None or self._started:
            return
        self._started = True
        blocks: SimpleQueue[tuple[Path, int, int]] = SimpleQueue()
        with contextlib.suppress(AngelslimError, OSError):
            for block in _blocks(Path(folder), self._most):
                blocks.put(block)
        for _ in range(READERS):
            self._pool.submit(self._read, blocks)

    def _read(self, blocks: SimpleQueue[tuple[Path, int, int]]) -> None:
        with contextlib.suppress(Empty, OSError), open(os.devnull, "wb") as nowhere:  # who needs what cannot be read meets it again, and reports it
            while not self._stop.is_set():
                file, offset, count = blocks.get_nowait()
                with file.open("rb") as stream:
                    os.sendfile(nowhere.fileno(), stream.fileno(), offset, count)  # copies nothing

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._pool.shutdown()


def _blocks(folder: Path, most: int) -> Iterator[tuple[Path, int, int]]:
    """(file, offset, bytes) of the first `most` bytes of the weight files."""
    for file in sorted(folder.glob("*.safetensors")):
        if not os.path.isfile(file):  # a pipe, or a link to itself
            continue
        size = inside(folder, file).stat().st_size
        for offset in range(0, size, BLOCK):
            count = min(BLOCK, size - offset, most)
            if count <= 0:
                return
            yield file, offset, count
            most -= count
