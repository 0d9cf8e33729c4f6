"""Which tokens a draft may propose, by what answers consist of, and the file that keeps the choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from angelslim_core.calibration.packing import Row, counts
from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import read_bytes, read_header, torch_dtype
from angelslim_core.io.writer import write_tensors

from ..vocabulary import Vocabulary

if TYPE_CHECKING:
    from ..target import Target


def select(rows: Sequence[Row], target: Target, size: int) -> Vocabulary:
    """The most frequent tokens of the answers; those that end answers and thoughts are always among them."""
    always = {*target.shape.special_ids, target.shape.thought_end_id}
    total = target.shape.vocab_size
    return Vocabulary.select(counts(rows, total), size, [i for i in always if 0 <= i < total])


def coverage_of(vocabulary: Vocabulary, rows: Sequence[Row]) -> float:
    """Share of the answers' tokens that are in it."""
    found = counts(rows, vocabulary.size)
    return float(found[vocabulary.ids].sum() / found.sum().clamp(min=1))


def write_selection(vocabulary: Vocabulary, path: Path) -> None:
    """Write `d2t` and `t2d` as a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"d2t": vocabulary.d2t, "t2d": vocabulary.t2d})


def read_selection(path: Path, size: int) -> Vocabulary:
    """A selection of a target's `size` tokens.

    Raises:
        ModelError: no such file, or of another target.
    """
    if not path.is_file():
        raise ModelError(732, str(path), "is no file", "make one: angelslim specdec vocab")
    infos = read_header(path)
    if infos.keys() != {"d2t", "t2d"}:
        raise ModelError(733, str(path), "holds no d2t and t2d")
    d2t, t2d = (read_bytes(i.file, i.offset, i.nbytes).view(torch_dtype(i.dtype)).reshape(i.shape) for i in (infos["d2t"], infos["t2d"]))
    return Vocabulary.from_stored(d2t, size, str(path), t2d)
