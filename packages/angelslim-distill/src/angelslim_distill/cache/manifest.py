"""What a cache says of itself, and what its files hold.

A folder holds `manifest.json` and safetensors shards, each of whole samples, one after another:

- `ids` [N, K] int32: most likely tokens of each position, by falling probability;
- `logp` [N, K] F32, F16 or BF16: their log-probabilities over the whole vocabulary; what is left of 1 is all other tokens';
- `label_logp` [N] fp32: that of the label, which may be none of the K;
- `tokens`, `labels` [N] int32: the sample's ids and what each position predicts, to be compared; a label of -1 is none;
- `lengths` [R] int64 and `keys` [R, 32] uint8: of each sample, its positions and its key.

Position t is the distribution of token t + 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from angelslim_core.errors import ModelError
from angelslim_core.io.strict_json import read_json
from angelslim_core.io.writer import write_json

MANIFEST = "manifest.json"
LogpDtype = Literal["F32", "F16", "BF16"]
_HASH = r"^[0-9a-f]{64}$"


class Shard(BaseModel):
    """One file."""

    model_config = ConfigDict(extra="forbid")

    file: str = Field(pattern=r"^cache-\d{5}\.safetensors$")
    nbytes: int = Field(ge=1)
    rows: int = Field(ge=1)
    positions: int = Field(ge=1)


class Manifest(BaseModel):
    """What the distributions are of.

    Args:
        teacher: name of its folder, for people; `fingerprint`: of its weights.
        vocabulary, template: of the tokenizer and of its chat template.
        vocab_size: how many tokens the distributions are over: those that the tokenizer knows, without what pads the teacher's head.
        top_k: tokens kept of each position.
        temperature: by which logits were divided; losses know what to do with 1 alone.
        dtype: of log-probabilities.
        data: sha256 of the file that samples were read from; `reading`: in what way.
        length: positions of a sample, at most.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    teacher: str
    fingerprint: str = Field(pattern=_HASH)
    vocabulary: str = Field(pattern=_HASH)
    template: str = Field(pattern=_HASH)
    vocab_size: int = Field(ge=2, lt=1 << 31)
    top_k: int = Field(ge=1, le=1 << 16)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    dtype: LogpDtype
    data: str
    reading: str
    length: int = Field(ge=1)
    rows: int = Field(default=0, ge=0)
    positions: int = Field(default=0, ge=0)
    shards: list[Shard] = Field(default_factory=list)

    def specs(self, rows: int, positions: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a shard."""
        per_token: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(("tokens", "labels"), ("I32", (positions,)))
        kept: dict[str, tuple[str, tuple[int, ...]]] = {"ids": ("I32", (positions, self.top_k)), "logp": (self.dtype, (positions, self.top_k))}
        return {**kept, **per_token, "label_logp": ("F32", (positions,)), "lengths": ("I64", (rows,)), "keys": ("U8", (rows, 32))}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache.

    Raises:
        ModelError: there is none, or it is none of this version.
    """
    document = read_json(folder / MANIFEST)
    if document.get("version") != 1:
        raise ModelError(
            930, str(folder), f"is a cache of format version {document.get('version')!r:.40}, and 1 is read", "make it anew: angelslim distill cache"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(931, f"{folder}/{MANIFEST}: {'.'.join(map(str, first['loc']))}", str(first["msg"])) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
