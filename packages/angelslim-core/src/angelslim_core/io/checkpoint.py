"""A checkpoint on disk: safetensors headers checked before anything else, tensors read by position.

Tensors are read with `pread` into fresh memory instead of a memory map: resident and address space stay at the tensor
that is read, and a file that shrinks while we read it is an error instead of a bus error.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .strict_json import parse_object, read_json

if TYPE_CHECKING:
    import torch

# safetensors dtype -> (bits, attribute of torch)
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8"), "U8": (8, "uint8"), "BOOL": (8, "bool"),
    "U16": (16, "uint16"), "U32": (32, "uint32"), "U64": (64, "uint64"),
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
MAX_HEADER = 100 << 20
MAX_RANK = 16
# a tensor is read by so many readers at a time, each a part of so many bytes at least, as one reader is slower than most disks
READERS, PART = 4, 32 << 20
# bytes that one call reads at most: some systems refuse what exceeds an int32
_CALL = 1 << 30
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "*processor_config.json",
              "preprocessor_config.json", "chat_template.json", "generation_config.json", "*.tiktoken", "spiece.model", "LICENSE*", "NOTICE*")  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """torch dtype of a safetensors dtype name."""
    import torch

    dtype = getattr(torch, DTYPES[name][1])
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Name that safetensors gives to a torch dtype."""
    name = str(dtype).removeprefix("torch.")
    return next(key for key, (_, attribute) in DTYPES.items() if attribute == name)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: dtype as safetensors names it, and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` in bytes, from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass
class Checkpoint:
    """A model folder whose headers have been checked.

    Args:
        folder: the folder.
        config: config.json, as it stands.
        tensors: name -> info, in the order of files and offsets.
        companions: tokenizer, processor and licence files that belong into any output.
        warnings: what is ignored in the folder, one line each.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    companions: tuple[Path, ...] = ()
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Check a folder's config, index and headers.

        Raises:
            ModelError: anything missing, inconsistent, truncated or unsafe.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelError(7, str(folder), "is no folder", "give a model folder, or a hub id when online")
        if not (folder / "config.json").is_file():
            raise ModelError(8, str(folder), "has no config.json")
        config = read_json(inside(folder, folder / "config.json"))
        if not isinstance(config.get("text_config") or {}, dict):
            raise ModelError(30, "config.json", "text_config is no object")
        tensors: dict[str, TensorInfo] = {}
        for file, names in _weight_files(folder).items():
            found = read_header(_confined(folder, file))
            _check_index(file, names, found)
            for name, info in found.items():
                if name in tensors:
                    raise ModelError(9, name, f"is stored in both {tensors[name].file.name} and {file}")
                tensors[name] = info
        if not tensors:
            raise ModelError(10, str(folder), "holds no tensor")
        everything = sorted(p for p in folder.iterdir() if p.is_file())
        companions = tuple(p for p in everything if any(fnmatch.fnmatch(p.name, c) for c in COMPANIONS) and not _is_code(p) and not _is_pickle(p))
        for companion in companions:
            inside(folder, companion)
        ignored = [f"{p.name} beside the weights is ignored and not copied" for p in everything if _is_code(p) or _is_pickle(p)]
        return cls(folder, config, tensors, companions, ignored)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or rows [start, stop) of its first dimension, in fresh CPU memory.

        Raises:
            ModelError: the file is shorter than its header said when it was opened.
        """
        info = self.tensors[name]
        shape, offset, nbytes = info.shape, info.offset, info.nbytes
        if rows is not None:
            stride = nbytes // shape[0]
            shape, offset, nbytes = (rows[1] - rows[0], *shape[1:]), offset + rows[0] * stride, (rows[1] - rows[0]) * stride
        return read_bytes(info.file, offset, nbytes).view(torch_dtype(info.dtype)).reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def has_tokenizer(self) -> bool:
        return any(p.name.startswith(("tokenizer", "spiece", "vocab")) for p in self.companions)


# whether tensors are read into page-locked memory
_locked = ContextVar("_locked", default=False)


@contextmanager
def page_locked() -> Iterator[None]:
    """What this thread reads inside comes into page-locked memory, which a GPU reads many times as fast."""
    token = _locked.set(True)
    try:
        yield
    finally:
        _locked.reset(token)


def read_bytes(file: Path, offset: int, nbytes: int) -> torch.Tensor:
    """`nbytes` of a file as a uint8 tensor.

    Raises:
        ModelError: the file ends before.
    """
    import torch

    buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=_locked.get())
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    step = max(PART, -(-nbytes // READERS))
    descriptor = os.open(file, os.O_RDONLY)

    def fill(start: int) -> None:
        stop = min(nbytes, start + step)
        while start < stop:
            got = os.preadv(descriptor, [view[start : min(stop, start + _CALL)]], offset + start)
            if got == 0:
                raise ModelError(11, file.name, "ended before its header's last tensor: it changed while it was read")
            start += got

    try:
        if nbytes <= step:
            fill(0)
        else:
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(fill, range(0, nbytes, step)))
    finally:
        os.close(descriptor)
    return buffer


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Check and read the header of one safetensors file; offsets must tile the file exactly.

    Raises:
        ModelError: the file is truncated, has holes or overlaps, or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ModelError(12, file.name, "is a Git LFS pointer, not the weights", "run `git lfs pull` in the model folder")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER or 8 + length > size:
            raise ModelError(13, file.name, f"is truncated or no safetensors file ({size} bytes)")
        header = parse_object(stream.read(length), file.name)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(31, file.name, "has metadata that are not text")
    infos = [_tensor_info(file, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.offset != end:
            raise ModelError(14, f"{file.name}: {info.name}", "overlaps its neighbour or leaves a hole")
        end += info.nbytes
    if end != size:
        raise ModelError(15, file.name, f"has {size} bytes where its header says {end}", "the file is truncated or was appended to; fetch it again")
    return {info.name: info for info in infos}


def _tensor_info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = DTYPES[dtype][0]
        good = (
            len(shape) <= MAX_RANK
            and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop))
            and set(entry) == {"dtype", "shape", "data_offsets"}
        )
    except (KeyError, TypeError, ValueError):
        good, bits = False, 0
    if not good or stop - start != math.prod(shape) * bits // 8:
        raise ModelError(16, f"{file.name}: {name[:200]}", "has an impossible dtype, shape or size in the header")
    return TensorInfo(name, dtype, shape, file, base + start, stop - start)


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Weight file -> names the index puts there (None without an index)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(inside(folder, index), MAX_HEADER).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelError(17, index.name, "has no weight_map from names to files")
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            names = files.setdefault(file, set())
            assert names is not None
            names.add(name)
        return dict(sorted(files.items()))
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    pickles = sorted(p.name for p in folder.iterdir() if _is_pickle(p))
    if pickles:
        raise ModelError(18, pickles[0], "holds pickled weights, which can run code when read", "convert the model to safetensors first")
    raise ModelError(19, str(folder), "has neither model.safetensors nor model.safetensors.index.json")


def _confined(folder: Path, file: str) -> Path:
    """The path of a weight file, which must be a plain name inside the folder (or its hub cache's blobs)."""
    if file != os.path.basename(file) or not file.endswith(".safetensors") or file.startswith("."):
        raise ModelError(40, "model.safetensors.index.json", f"names {file[:200]!r}, which is no plain *.safetensors name inside the folder")
    path = folder / file
    if not os.path.isfile(path):  # false for a name too long for the system, too
        raise ModelError(41, file[:200], "is named by the index but missing", "fetch the model again")
    return inside(folder, path)


def inside(folder: Path, path: Path) -> Path:
    """The path of a file, which must not be a link out of the folder (or its hub cache's blobs)."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise ModelError(42, path.name, "is a link to a place outside the model folder")
    return path


def _check_index(file: str, names: set[str] | None, found: dict[str, TensorInfo]) -> None:
    if names is None:
        return
    for name in sorted(names - found.keys()):
        raise ModelError(43, file, f"lacks {name}, which the index puts there")
    for name in sorted(found.keys() - names):
        raise ModelError(44, file, f"holds {name}, which the index does not name there")


def _is_pickle(path: Path) -> bool:
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in PICKLES)


def _is_code(path: Path) -> bool:
    return path.suffix in (".py", ".so", ".pyc")
