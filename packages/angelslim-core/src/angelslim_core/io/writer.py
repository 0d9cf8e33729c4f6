"""Writing a checkpoint tensor by tensor: all sizes are known before the first byte, so nothing is buffered.

Each shard's header is written first and its tensors go to their final place in any order. Memory is the tensor at hand;
a peer that hands a whole shard to a save function needs the shard in memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ResourceError
from .checkpoint import DTYPES, TensorSpec, dtype_name

if TYPE_CHECKING:
    import torch


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec.shape) * DTYPES[spec.dtype][0] // 8


def split_shards(units: Sequence[Mapping[str, TensorSpec]], max_bytes: int) -> list[list[int]]:
    """Unit indices per shard, in order; a unit is never divided."""
    shards: list[list[int]] = [[]]
    filled = 0
    for index, unit in enumerate(units):
        size = sum(map(spec_bytes, unit.values()))
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += size
    return shards


class ShardWriter:
    """One safetensors file of known content.

    Args:
        path: the file, created with its final size.
        specs: name -> dtype and shape of every tensor.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.specs = dict(specs)
        self.missing = set(specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        self._offsets: dict[str, int] = {}
        # widest dtype first, so that every tensor is aligned to its element size
        for name, spec in sorted(self.specs.items(), key=lambda item: (-DTYPES[item[1].dtype][0], item[0])):
            size = spec_bytes(spec)
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + size]}
            self._offsets[name] = offset
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self.nbytes = self._base + offset
        self._descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
        try:
            _pwrite(self._descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
            # allocate now: a full disk must fail here, not hours later
            if offset:
                os.posix_fallocate(self._descriptor, 0, self.nbytes)
        except OSError as error:
            self.close()
            raise disk_error(error, path, self.nbytes) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor; dtype and shape must be those announced."""
        spec = self.specs[name]
        have = TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape))
        if have != spec:
            raise AssertionError(f"{name}: {have} was written where {spec} was planned")
        import torch

        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            _pwrite(self._descriptor, memoryview(data), self._base + self._offsets[name])
        except OSError as error:
            raise disk_error(error, self.path, self.nbytes) from error
        self.missing.discard(name)

    def flush(self) -> None:
        """Bring what was written to the disk."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise disk_error(error, self.path, self.nbytes) from error

    def close(self) -> None:
        """Close the file; once more does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def finish(self, flush: bool = True) -> None:
        """Flush to disk and close; every tensor must have been written."""
        if self.missing:
            raise AssertionError(f"{self.path.name}: {sorted(self.missing)[0]} was planned and never written")
        if flush:
            os.fsync(self._descriptor)
        self.close()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write tensors that are all there to a safetensors file; returns its bytes.

    Raises:
        ResourceError: the disk is full.
    """
    specs = {name: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    with disk_errors(path, sum(map(spec_bytes, specs.values()))):
        writer = ShardWriter(path, specs)
        try:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.finish()
        finally:
            writer.close()
    return writer.nbytes


def keep_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """As `write_tensors`; the file is complete or absent after a crash."""
    temporary = path.with_suffix(".tmp")
    write_tensors(temporary, tensors)
    os.replace(temporary, path)
    fsync_folder(path.parent)


def disk_error(error: OSError, path: Path, needed: int) -> ResourceError:
    """The error for a failed write, with needed and free bytes."""
    status = os.statvfs(next(p for p in path.absolute().parents if p.is_dir()))
    free = status.f_bavail * status.f_frsize
    return ResourceError(
        1, str(path), f"cannot be written: {error.strerror} (needs {needed} bytes, {free} are free)", "free space and run the same command again"
    )


@contextmanager
def disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn a full disk, met while `path` is made, into an error of ours."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_error(error, path, needed) from error


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + (1 << 30)], offset + done)


def shard_name(index: int, count: int) -> str:
    """File name of a shard, counted from 0."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, shards: Sequence[Mapping[str, TensorSpec]]) -> None:
    """Write model.safetensors.index.json for more than one shard."""
    if len(shards) == 1:
        return
    weight_map = {name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
    total = sum(spec_bytes(spec) for shard in shards for spec in shard.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, value: object) -> None:
    """Write JSON durably: the file is complete or absent after a crash."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text durably, by a temporary file and a rename."""
    temporary, data = path.with_name(f".{path.name}.tmp"), text.encode()
    with disk_errors(path, len(data)):
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
