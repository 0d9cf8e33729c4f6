"""By what samples, tokenizers, templates and teachers are known again."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from angelslim_core.calibration.render import template_of
from angelslim_core.io.checkpoint import Checkpoint, TensorInfo, read_bytes
from angelslim_core.model import sanitized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE = 1 << 10  # bytes of a tensor that are looked at, at its start, in its middle and at its end


def sample_key(ids: Sequence[int]) -> str:
    """Hex sha256 of a sample's token ids."""
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of all tokens with their ids; a padded size of the model's head does not count."""
    return _of_json(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens it knows, up to the last; rows of a head beyond them only pad it."""
    return max(tokenizer.get_vocab().values()) + 1


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of the chat template, also where there is none."""
    return _of_json(template_of(tokenizer))


def model_fingerprint(folder: Path) -> str:
    """Hex sha256 of a model's config and of parts of every tensor: a terabyte is not read, and training leaves no tensor as it was.

    Raises:
        ModelError: it is no model folder.
    """
    checkpoint = Checkpoint.open(folder)
    found = hashlib.sha256(_of_json(sanitized(checkpoint.config)).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        found.update(_of_json([name, info.dtype, info.shape]).encode())
        for start in _starts(info):
            found.update(read_bytes(info.file, info.offset + start, min(_PIECE, info.nbytes)).numpy().tobytes())
    return found.hexdigest()


def _starts(info: TensorInfo) -> list[int]:
    last = max(0, info.nbytes - _PIECE)
    return sorted({0, last // 2, last})


def _of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
