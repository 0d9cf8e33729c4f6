"""A draft from what the command `train` or a step of a recipe is given."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from angelslim_core.calibration.packing import Order
from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import RecipeError
from angelslim_core.parallel import Group
from angelslim_core.training import TrainingOptions
from angelslim_core.workdir import sha256

from ..drafts.base import Heads
from ..drafts.exit_signals import any_labels
from .inputs import from_conversations, from_shards
from .prepare import new_draft
from .run import Plan, train
from .selection import read_selection

if TYPE_CHECKING:
    import torch

    from ..target import Target


def train_draft(
    given: Mapping[str, Any], target: Target, device: torch.device, *, group: Group | None = None, progress: Progress = silent,
    stop_requested: Callable[[], bool] = never,
) -> dict[str, Any]:  # fmt: skip
    """Train and write a draft folder.

    Args:
        given: options of the command by name, `settings` being a mapping.
        target: may be on another device where features were dumped.

    Raises:
        RecipeError: exit signals are asked for, and the data have no labels for them.

    Returns:
        numbers of `run.train`, and how many conversations, rows and tokens there are.
    """
    inputs = from_shards(given, target) if given["features"] is not None else from_conversations(given, target)
    vocabulary = read_selection(Path(given["vocab"]), target.shape.vocab_size) if given["vocab"] else None
    draft, coverage = new_draft(
        given["draft"], target, inputs.rows, device, vocabulary=vocabulary, size=given["draft_vocab"], options=given["settings"], seed=given["seed"]
    )  # fmt: skip
    if getattr(draft.config, "exit_signals", ()) and not any_labels(inputs.rows, draft.config.thought_end_id, draft.config.answer_end_ids):
        what = "no thought is closed in the data and no answer ends with a special token, so that nothing says how much of one was left"
        raise RecipeError(782, "exit_signals", what, "give data whose answers are whole, or leave the signals out")
    batch = given["batch"] or (4 if device.type == "cuda" else 1)
    per_epoch = len(inputs.rows) / (Order(len(inputs.rows), batch, 0).batch * given["accumulate"])
    options = TrainingOptions(
        steps=given["steps"] or math.ceil(given["epochs"] * per_epoch), lr=given["lr"], warmup=given["warmup"], weight_decay=given["weight_decay"],
        clip=given["clip"], accumulate=given["accumulate"], seed=given["seed"],
    )  # fmt: skip
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if group is not None and group.size > 1 else 1
    source, validation = inputs.sources(draft, device, target.dtype, given["keep"], group if given["shard"] == "all" else None, beside)
    heads = target.heads()
    heads = Heads(heads.embedding.to(device), heads.head.to(device), heads.scale)
    known = {
        "model": target.shape.fingerprint, "data": inputs.data, "template": inputs.template, "length": inputs.length, "turns": inputs.turns,
        "validation_share": inputs.share, "vocabulary": sha256(Path(given["vocab"])) if given["vocab"] else "", "dtype": str(target.dtype).removeprefix("torch."),
    }  # fmt: skip
    plan = Plan(
        draft, heads, source, validation, options, batch, inputs.prompts[: given["probe"]], known, given["every"], given["export_every"],
        in_parts=given["shard"] != "none",
    )  # fmt: skip
    found = train(
        plan, target if given["probe"] else None, Path(given["out"]), replace=given["replace"], group=group, progress=progress, stop_requested=stop_requested
    )  # fmt: skip
    return {
        **found, "conversations": inputs.documents, "dropped": inputs.dropped, "rows": len(inputs.rows), "tokens": sum(map(len, inputs.rows)),
        "vocabulary_coverage": coverage, "features": source.keep,
    }  # fmt: skip
