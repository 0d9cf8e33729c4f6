"""What a training reads: conversations, with the target beside, or features that were dumped."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from angelslim_core.calibration.chats import read_conversations
from angelslim_core.calibration.packing import Row
from angelslim_core.calibration.spans import Renderer
from angelslim_core.errors import ModelError
from angelslim_core.workdir import sha256

from ..data.shards import Shards
from .features import Source, computed, stored, where_to_keep
from .parts import read_together
from .prepare import prepare

if TYPE_CHECKING:
    import torch

    from angelslim_core.parallel import Group

    from ..drafts.base import Draft
    from ..target import Target

_SHARE, _ENOUGH = 0.02, 500


@dataclass
class Inputs:
    """Rows and where their features come from.

    Args:
        held_out: rows for validation.
        prompts: to measure acceptance on.
        share: of conversations that were to be held out.
        data, template: sha256.
        shards: the features, if they were dumped; `numbers` and `held_numbers`: which rows of them are `rows` and `held_out`.
    """

    target: Target
    rows: Sequence[Row]
    held_out: Sequence[Row]
    prompts: Sequence[Sequence[int]]
    documents: int
    dropped: int
    share: float
    data: str
    template: str
    length: int
    turns: str
    folder: Path | None = None
    shards: Shards | None = None
    numbers: Sequence[int] = ()
    held_numbers: Sequence[int] = ()

    def sources(
        self, draft: Draft, device: torch.device, dtype: torch.dtype, keep: Any, together: Group | None = None, processes: int = 1
    ) -> tuple[Source, Source | None]:  # fmt: skip
        """Batches to train on, and those held out; `processes` share the machine.

        Args:
            together: the processes over which the target's layers lie in parts; None: they do not.

        Raises:
            ModelError: dumped features are not those that the draft reads.
        """
        layers = draft.config.aux_hidden_state_layer_ids
        if self.shards is not None and self.shards.manifest.layer_ids != layers:
            raise ModelError(734, str(self.folder), f"holds features of layers {list(self.shards.manifest.layer_ids)}, and the draft reads {list(layers)}",
                             "make them anew: angelslim specdec dump")  # fmt: skip
        width = (len(layers) + 1) * self.target.shape.hidden_size
        place = where_to_keep([*self.rows, *self.held_out], width, dtype, device, processes)[0] if keep == "auto" else keep

        def source(rows: Sequence[Row], numbers: Sequence[int]) -> Source:
            if self.shards is None:
                read = computed(self.target, rows, layers)
                return Source(rows, read if together is None else read_together(read, together), device, dtype, place)
            of_shards = stored(self.shards)
            return Source(rows, lambda asked: of_shards([numbers[i] for i in asked]), device, dtype, place)

        return source(self.rows, self.numbers), source(self.held_out, self.held_numbers) if self.held_out else None


def from_conversations(given: Mapping[str, Any], target: Target) -> Inputs:
    """Inputs of `--data`."""
    renderer = Renderer(target.tokenizer, given["model"])
    conversations = read_conversations(Path(given["data"]))
    share = given["validation"]
    if share is None:
        share = _SHARE if len(conversations) >= _ENOUGH else 0.0
    found = prepare(conversations, renderer, given["length"], validation=share, turns=given["turns"], seed=given["seed"])
    return Inputs(
        target, found.rows, found.held_out, found.prompts, found.documents, found.dropped, share, sha256(Path(given["data"])), found.template, given["length"], given["turns"]
    )  # fmt: skip


def from_shards(given: Mapping[str, Any], target: Target) -> Inputs:
    """Inputs of `--features`; whole rows are held out."""
    folder = Path(given["features"])
    shape = target.shape
    shards = Shards(folder, {"fingerprint": shape.fingerprint, "hidden_size": shape.hidden_size})
    manifest = shards.manifest
    documents = sum(int(row.documents[-1]) + 1 for row in shards.rows)
    share = given["validation"] if given["validation"] is not None else _SHARE if documents >= _ENOUGH else 0.0
    order = list(range(len(shards.rows)))
    random.Random(given["seed"]).shuffle(order)
    held = sorted(order[: min(round(share * len(order)), len(order) - 1)])
    left_out = set(held)
    numbers = [i for i in range(len(order)) if i not in left_out]
    rows, held_out = [shards.rows[i] for i in numbers], [shards.rows[i] for i in held]
    prompts = [prompt for row in held_out or rows for prompt in _prompts(row)]
    return Inputs(
        target, rows, held_out, prompts, documents, 0, share, manifest.data, manifest.template, manifest.length, manifest.turns,
        folder, shards, numbers, held,
    )  # fmt: skip


def _prompts(row: Row) -> list[list[int]]:
    """Tokens of each document up to its first answer."""
    found = []
    for number in range(int(row.documents[-1]) + 1):
        ids, mask = (part[row.documents == number].tolist() for part in (row.ids, row.loss_mask))
        if any(mask[1:]):
            found.append(ids[: mask.index(True)])
    return [p for p in found if p]
