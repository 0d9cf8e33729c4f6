"""A cache as the teacher of a training; whatever it holds is checked before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import TensorInfo, inside, read_bytes, read_header, torch_dtype

from ..fingerprints import model_fingerprint, template_hash, vocabulary_hash
from ..targets import Batch, TopK
from .manifest import Manifest, Shard, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HINT = "make it anew: angelslim distill cache"
_SLACK = 0.03  # by which K probabilities may exceed 1: entropy times the rounding of BF16


def open_cache(
    folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, teacher: Path | None = None, top_k: int | None = None
) -> Cache:  # fmt: skip
    """The teacher that a cache holds, for a student.

    Args:
        tokenizer: the student's; `vocab_size`: the width of its logits.
        teacher: folder of the model whose distributions are wanted; None: whatever model the cache is of.
        top_k: tokens to use of those kept; None: all.

    Raises:
        ModelError: it is of another tokenizer, chat template or teacher, of tokens that the student has not, of another temperature than 1, has fewer
            tokens, or is broken.
    """
    manifest = read_manifest(folder)
    wanted: dict[str, tuple[Any, Any]] = {
        "tokenizer": (manifest.vocabulary, vocabulary_hash(tokenizer)),
        "chat template": (manifest.template, template_hash(tokenizer)),
        "temperature": (manifest.temperature, 1.0),
        "teacher": (manifest.fingerprint, model_fingerprint(teacher) if teacher is not None else manifest.fingerprint),
    }
    for name, (found, asked) in wanted.items():
        if found != asked:
            raise ModelError(932, str(folder), f"is of another {name}: {found!r:.24}, and {asked!r:.24} is wanted", _HINT)
    if manifest.vocab_size > vocab_size:  # a wider head is cut to them
        what = f"is of distributions over {manifest.vocab_size} tokens, and the student's head has {vocab_size}"
        raise ModelError(1112, str(folder), what, f"{_HINT}, which leaves out what pads the teacher's head")
    if top_k is not None and not 1 <= top_k <= manifest.top_k:
        raise ModelError(933, str(folder), f"keeps {manifest.top_k} tokens a position, and {top_k} are wanted", "lower top_k, or make the cache anew with more")
    return Cache(folder, manifest, top_k)


class _Place(NamedTuple):
    """Where a sample lies: its shard and positions."""

    shard: int
    start: int
    stop: int


class Cache:
    """A `targets.Teacher` that reads. All headers are checked at once, each sample when it is first read.

    Raises:
        ModelError: a file is missing, truncated or does not hold what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, top_k: int | None = None) -> None:
        self.folder, self.manifest, self.top_k = folder, manifest, top_k or manifest.top_k
        self._infos: list[dict[str, TensorInfo]] = []
        self._places: dict[bytes, _Place] = {}
        self._checked: set[bytes] = set()
        for shard in manifest.shards:
            self._open(shard)
        if len(self._places) != manifest.rows or not self._places:
            raise ModelError(934, str(folder), f"holds {len(self._places)} samples where its manifest says {manifest.rows}", _HINT)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sample: str) -> bool:
        return _key(sample) in self._places

    def __call__(self, batch: Batch) -> TopK:
        """Distributions of a batch's samples; those of padding are any.

        Raises:
            ModelError: it holds no such sample, other tokens under its key, or numbers that are no distribution.
        """
        rows, width = batch.input_ids.shape
        ids = torch.arange(self.top_k).expand(rows, width, -1).clone()
        logp = torch.full((rows, width, self.top_k), -1.0).sub(torch.tensor(float(self.manifest.vocab_size)).log())
        label_logp = torch.zeros(rows, width)
        lengths = batch.attention_mask.sum(1).tolist()
        for i, sample in enumerate(batch.samples):
            found = self._read(sample)
            length = self._compare(sample, found, batch, i, lengths[i])
            ids[i, :length] = found["ids"][:, : self.top_k]
            logp[i, :length] = found["logp"][:, : self.top_k].float()
            label_logp[i, :length] = found["label_logp"]
        device = batch.input_ids.device
        return TopK(ids.to(device), logp.to(device), label_logp.to(device), self.manifest.vocab_size)

    def _read(self, sample: str) -> dict[str, Tensor]:
        key = _key(sample)
        place = self._places.get(key)
        if place is None:
            what = f"holds no sample {sample:.16}; its file was read with {self.manifest.reading:.200}"
            raise ModelError(935, str(self.folder), what, "read the same file in the same way, or make the cache anew")
        infos = self._infos[place.shard]
        found = {name: _rows(infos[name], place.start, place.stop) for name in ("ids", "logp", "label_logp", "tokens", "labels")}
        if key not in self._checked:
            self._check(sample, found)
            self._checked.add(key)
        return found

    def _compare(self, sample: str, found: dict[str, Tensor], batch: Batch, row: int, length: int) -> int:
        """Whether tokens and counted labels are those of the batch."""
        tokens, labels = batch.input_ids[row, :length].cpu(), batch.labels[row, :length].cpu()
        counted = batch.counted[row, :length].cpu()
        same = len(found["tokens"]) == length and torch.equal(found["tokens"].long(), tokens) and torch.equal(found["labels"].long()[counted], labels[counted])
        if not same:
            raise ModelError(936, str(self.folder), f"holds other tokens or labels of sample {sample:.16}", _HINT)
        return length

    def _check(self, sample: str, found: dict[str, Tensor]) -> None:
        ids, logp, label = found["ids"].long(), found["logp"].float(), found["label_logp"]
        good = (
            int(ids.min()) >= 0
            and int(ids.max()) < self.manifest.vocab_size
            and bool((ids.sort(-1).values.diff(dim=-1) > 0).all())
            and bool(logp.isfinite().all() & label.isfinite().all())
            and bool((logp.diff(dim=-1) <= 0).all())
            and float(logp.exp().sum(-1).max()) <= 1 + _SLACK
            and float(label.max()) <= _SLACK
        )
        if not good:
            raise ModelError(937, str(self.folder), f"its sample {sample:.16} holds numbers that are no distribution", _HINT)

    def _open(self, shard: Shard) -> None:
        path = self.folder / shard.file
        size = path.stat().st_size if path.is_file() else 0
        if size != shard.nbytes:
            raise ModelError(938, str(path), f"has {size} bytes where the manifest says {shard.nbytes}", f"it is truncated or not of this cache; {_HINT}")
        infos = read_header(inside(self.folder, path))
        if {name: (info.dtype, info.shape) for name, info in infos.items()} != self.manifest.specs(shard.rows, shard.positions):
            raise ModelError(939, str(path), "does not hold the tensors that the manifest says", _HINT)
        lengths, keys = _rows(infos["lengths"], 0, shard.rows), _rows(infos["keys"], 0, shard.rows)
        if int(lengths.min()) < 1 or int(lengths.max()) > self.manifest.length or int(lengths.sum()) != shard.positions:
            raise ModelError(
                940, str(path), f"has samples of other lengths than {shard.positions} positions in all, {self.manifest.length} each at most", _HINT
            )
        ends = lengths.cumsum(0).tolist()
        for key, length, end in zip(keys.tolist(), lengths.tolist(), ends, strict=True):
            if self._places.setdefault(bytes(key), place := _Place(len(self._infos), end - length, end)) != place:
                raise ModelError(941, str(path), f"sample {bytes(key).hex():.16} occurs twice", _HINT)
        self._infos.append(infos)


def _rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    stride = info.nbytes // info.shape[0]
    data = read_bytes(info.file, info.offset + start * stride, (stop - start) * stride)
    return data.view(torch_dtype(info.dtype)).reshape(stop - start, *info.shape[1:])


def _key(sample: str) -> bytes:
    try:
        return bytes.fromhex(sample)
    except ValueError:
        return b""
