"""A cache of one model's distributions on one file, as the passes that read it read that file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import ModelError
from angelslim_core.products import products

from ..data.documents import Count
from ..data.rows import collate, moved, prepare
from ..fingerprints import model_fingerprint, template_hash, vocabulary_hash, vocabulary_size
from ..targets import Batch
from ..teacher import ModelTeacher
from .capture import keeping
from .manifest import LogpDtype, Manifest
from .writing import write_cache

if TYPE_CHECKING:
    from angelslim_core.calibration.spans import Turns
    from angelslim_core.plugins import PluginHost


@dataclass(frozen=True)
class CacheOptions:
    """What is kept, and how the file is read: as the options of that name of a pass that is to find its rows in the cache.

    Args:
        top_k: tokens kept of each position.
        dtype: of log-probabilities.
        batch: rows the model reads at once.
        shard_positions: of a file, about.
    """

    top_k: int = 64
    dtype: LogpDtype = "F32"
    length: int = 1024
    count: Count = "answers"
    turns: Turns = "joined"
    pack: bool = True
    held_out: float = 0.02
    seed: int = 0
    batch: int = 1
    shard_positions: int = 1 << 16

    @property
    def reading(self) -> str:
        """How the file is read, for messages."""
        rows = "documents share rows" if self.pack else "a document a row"
        return f"length {self.length}, count {self.count}, turns {self.turns}, {rows}, held_out {self.held_out:g}, seed {self.seed}"


def make_cache(
    folder: Path, data: Path, out: Path, options: CacheOptions, device: str, *, host: PluginHost | None = None, replace: bool = False,
    progress: Progress = silent, stop_requested: Callable[[], bool] = never,
) -> Manifest:  # fmt: skip
    """Run a model on all rows of a file and keep its most likely tokens.

    Args:
        folder: of the model; `data`: JSONL or text.

    Raises:
        ModelError: no model folder, or one without a tokenizer.
        RecipeError: the file cannot be used, or an unfinished cache of something else is in the way.
        OutputError: the folder exists.
        StoppedError: it was asked to stop; what is finished is kept.
    """
    from angelslim_core.loading import load_model
    from angelslim_core.workdir import sha256

    loaded = load_model(folder, device, host=host, packed=False)
    if loaded.tokenizer is None:
        raise ModelError(943, str(folder), "has no tokenizer, so no data can be read for it", "copy the tokenizer files into the model folder")
    model = loaded.model.requires_grad_(False)
    tokens = min(vocabulary_size(loaded.tokenizer), len(model.get_output_embeddings().weight))
    teacher = ModelTeacher(model, tokens)
    read: dict[str, Any] = {"length": options.length, "count": options.count, "turns": options.turns, "held_out": options.held_out, "seed": options.seed}
    found = prepare(data, loaded.tokenizer, str(folder), packed=options.pack and teacher.can_pack, **read)
    rows = sorted([*found.train, *found.held_out], key=len)
    kept = keeping(teacher, options.top_k)
    manifest = Manifest(
        teacher=folder.name, fingerprint=model_fingerprint(folder), vocabulary=vocabulary_hash(loaded.tokenizer), template=template_hash(loaded.tokenizer),
        vocab_size=tokens, top_k=options.top_k, temperature=1.0, dtype=options.dtype,
        data=sha256(data), reading=options.reading, length=options.length,
    )  # fmt: skip

    def batch_of(number: int) -> Batch:
        return moved(collate(rows[number * options.batch : (number + 1) * options.batch]), model.device)

    with products(device):
        return write_cache(
            batch_of, -(-len(rows) // options.batch), kept, manifest, out,
            batches_a_shard=max(1, options.shard_positions // (options.batch * options.length)), replace=replace, progress=progress,
            stop_requested=stop_requested,
        )  # fmt: skip
