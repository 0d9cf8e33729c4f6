"""A target's features on disk, so that a draft can be trained where the target does not fit beside it.

A folder holds `manifest.json` and safetensors shards. A shard has the tokens of whole rows one after another (`ids`, `loss_mask`,
`documents`, `positions`: [N]; `aux`: [N, n H]; `final`: [N, H]) and how long each row is (`lengths`: [R]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from angelslim_core.calibration.packing import Row
from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import TensorInfo, read_bytes, read_header, torch_dtype
from angelslim_core.io.strict_json import read_json
from angelslim_core.io.writer import write_json, write_tensors

MANIFEST = "manifest.json"
TOKENS = ("ids", "loss_mask", "documents", "positions")
FEATURES = ("aux", "final")


class Shard(BaseModel):
    """One file."""

    model_config = ConfigDict(extra="forbid")

    file: str = Field(pattern=r"^features-\d{5}\.safetensors$")
    nbytes: int = Field(ge=1)
    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)


class Manifest(BaseModel):
    """What the features are of.

    Args:
        data: sha256 of the conversations.
        template: sha256 of the chat template.
        fingerprint: of the target.
        turns: whether earlier answers of a conversation were trained on together with the last.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    layer_ids: tuple[int, ...]
    hidden_size: int = Field(ge=1)
    dtype: str
    template: str
    data: str
    length: int
    turns: str
    seed: int
    tokens: int = Field(default=0, ge=0)
    rows: int = Field(default=0, ge=0)
    shards: list[Shard] = Field(default_factory=list)


def write_shard(folder: Path, number: int, rows: Sequence[Row], aux: Sequence[Tensor], final: Sequence[Tensor]) -> Shard:
    """Write whole rows with their features, aux [T, n H] and final [T, H] of each, into a file of a folder."""
    name = f"features-{number:05d}.safetensors"
    tensors = {key: torch.cat([getattr(row, key) for row in rows]) for key in TOKENS}
    tensors |= {"aux": torch.cat(list(aux)), "final": torch.cat(list(final)), "lengths": torch.tensor([len(row) for row in rows])}
    nbytes = write_tensors(folder / name, tensors)
    return Shard(file=name, nbytes=nbytes, rows=len(rows), tokens=int(tensors["lengths"].sum()))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


@dataclass(frozen=True)
class _Place:
    """Where a row lies."""

    shard: int
    start: int
    stop: int


class Shards:
    """A folder of features, all headers of which have been checked.

    Args:
        wanted: fields of the manifest that must be these, by name.

    Raises:
        ModelError: no such folder, a file that is missing or truncated, or features of something else; says what differs.
    """

    def __init__(self, folder: Path, wanted: Mapping[str, Any]) -> None:
        try:
            self.manifest = Manifest.model_validate(read_json(folder / MANIFEST))
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(741, f"{folder}/{MANIFEST}: {'.'.join(map(str, first['loc']))}", str(first["msg"])) from error
        for name, value in wanted.items():
            found = getattr(self.manifest, name)
            if found != value:
                raise ModelError(
                    742,
                    str(folder),
                    f"holds features of another {name.replace('_', ' ')}: {found!r:.80}, and {value!r:.80} is wanted",
                    "make them anew: angelslim specdec dump",
                )
        self._infos: list[dict[str, TensorInfo]] = []
        self.rows: list[Row] = []
        self._places: list[_Place] = []
        for number, shard in enumerate(self.manifest.shards):
            self._open(folder / shard.file, shard, number)
        if len(self.rows) != self.manifest.rows or not self.rows:
            raise ModelError(743, str(folder), f"holds {len(self.rows)} rows where its manifest says {self.manifest.rows}")

    def _open(self, path: Path, shard: Shard, number: int) -> None:
        if not path.is_file() or path.stat().st_size != shard.nbytes:
            size = path.stat().st_size if path.is_file() else 0
            raise ModelError(
                744, str(path), f"has {size} bytes where the manifest says {shard.nbytes}", "it is truncated or not of this set; make the features anew"
            )
        infos = read_header(path)
        width, n, dtype = self.manifest.hidden_size, shard.tokens, self.manifest.dtype
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {name: ("BOOL" if name == "loss_mask" else "I64", (n,)) for name in TOKENS}
        shapes |= {"aux": (dtype, (n, width * len(self.manifest.layer_ids))), "final": (dtype, (n, width)), "lengths": ("I64", (shard.rows,))}
        if {name: (info.dtype, info.shape) for name, info in infos.items()} != shapes:
            raise ModelError(738, str(path), "does not hold the tensors that the manifest says")
        tokens = {name: _read(infos[name]) for name in TOKENS}
        lengths = _read(infos["lengths"])
        if int(lengths.min()) < 1 or int(lengths.sum()) != n:
            raise ModelError(739, str(path), f"has rows of other lengths than {n} tokens in all")
        parts = [tokens[name].split(lengths.tolist()) for name in TOKENS]
        self.rows += [Row(*row) for row in zip(*parts, strict=True)]
        ends = lengths.cumsum(0).tolist()
        self._places += [_Place(number, end - length, end) for end, length in zip(ends, lengths.tolist(), strict=True)]
        self._infos.append(infos)

    def features(self, number: int) -> tuple[Tensor, Tensor]:
        """aux [T, n H] and final [T, H] of a row."""
        place = self._places[number]
        infos = self._infos[place.shard]
        return _read(infos["aux"], place.start, place.stop), _read(infos["final"], place.start, place.stop)


def _read(info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
    stop = info.shape[0] if stop is None else stop
    stride = info.nbytes // info.shape[0]
    data = read_bytes(info.file, info.offset + start * stride, (stop - start) * stride)
    return data.view(torch_dtype(info.dtype)).reshape(stop - start, *info.shape[1:])
