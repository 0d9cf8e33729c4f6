"""Hidden states between two layers as files: for a resumed run, and to be read a batch at a time where memory is short."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .io.checkpoint import TensorInfo, TensorSpec, dtype_name, read_bytes, read_header, torch_dtype
from .io.writer import ShardWriter

if TYPE_CHECKING:
    from torch import Tensor

    from .layer import LayerBatch


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; what holds it reads it anew each time it is asked for."""

    info: TensorInfo

    def read(self) -> Tensor:
        return read_bytes(self.info.file, self.info.offset, self.info.nbytes).view(torch_dtype(self.info.dtype)).reshape(self.info.shape)


def stored(paths: Sequence[Path]) -> dict[int, Stored]:
    """Number of a batch -> its hidden states, in whichever of the files they are."""
    return {int(name): Stored(info) for path in paths for name, info in read_header(path).items()}


class Recording:
    """A file of hidden states, written batch by batch while the next are made; it is complete or absent."""

    def __init__(self, path: Path, batches: Sequence[LayerBatch]) -> None:
        self.path = path
        self._temporary = path.with_suffix(".tmp")
        self._batches = batches
        self._writer: ShardWriter | None = None
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def add(self, number: int, hidden: Tensor) -> None:
        """Write one batch [B, T, H], which must not change before the next one is added; all batches have the same H and dtype."""
        if self._writer is None:
            dtype, width = dtype_name(hidden.dtype), hidden.shape[-1]
            self._writer = ShardWriter(self._temporary, {f"{b.number:06d}": TensorSpec(dtype, (*b.mask.shape, width)) for b in self._batches})
        if self._writing:
            self._writing.result()
        self._writing = self._thread.submit(self._writer.write, f"{number:06d}", hidden)

    def finish(self) -> None:
        """Put the file in its place; its digest, not a flush, tells whether the disk got it before a power cut."""
        assert self._writer and self._writing
        self._writing.result()
        self._thread.shutdown()
        self._writer.finish(flush=False)
        os.replace(self._temporary, self.path)

    def close(self) -> None:
        """Give up on the file."""
        self._thread.shutdown()
        if self._writer:
            self._writer.close()


class Interned:
    """Arguments of layers without duplicates: most batches and layers get equal masks and position embeddings."""

    # masks of padded batches all differ; comparing with all of them would take long
    _RECENT = 4

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], list[Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        """`value` with each tensor replaced by an equal one met before."""
        import torch

        if isinstance(value, torch.Tensor):
            known = self._seen.setdefault((value.shape, value.dtype, value.device), [])
            for tensor in known:
                if tensor is value or torch.equal(tensor, value):
                    return tensor
            known.append(value)
            del known[: -self._RECENT]
            return value
        if isinstance(value, tuple):
            return tuple(map(self, value))
        return {k: self(v) for k, v in value.items()} if isinstance(value, Mapping) else value
