"""One training from its inputs to a draft folder, in one process or in several, stopped and gone on with as it comes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from angelslim_core.context import Progress, never, silent
from angelslim_core.device import peak_gpu_bytes
from angelslim_core.io.writer import write_json
from angelslim_core.parallel import Group
from angelslim_core.training import TrainingOptions
from angelslim_core.workdir import Workdir

from ..drafts.base import Draft, Heads
from ..folder import save_draft, write_draft
from .features import Source
from .trainer import DraftTraining

if TYPE_CHECKING:
    from ..target import Target

PROBE_TOKENS = 128
_PROBE_ROWS = 8


@dataclass(frozen=True)
class Plan:
    """What is trained on what.

    Args:
        prompts: to measure acceptance on.
        inputs: what decides the result beside options and draft, for a run that goes on.
        export_every: steps between two exports, beside the output as OUT.step-N; 0: none.
        every: steps between two looks at validation and acceptance, and two states.
        in_parts: fp32 weights and moments lie in parts over the processes; a run that goes on may do otherwise.
    """

    draft: Draft
    heads: Heads
    source: Source
    validation: Source | None
    options: TrainingOptions
    batch: int
    prompts: Sequence[Sequence[int]]
    inputs: Mapping[str, Any]
    every: int = 500
    export_every: int = 0
    in_parts: bool = False


def train(
    plan: Plan, target: Target | None, out: Path, *, replace: bool = False, group: Group | None = None, progress: Progress = silent,
    stop_requested: Callable[[], bool] = never,
) -> dict[str, Any]:  # fmt: skip
    """Train and write the folder; an unfinished training of the same inputs is gone on with.

    Args:
        target: to measure acceptance with; None: it is not measured.

    Returns:
        what `training.json` in the folder says.

    Raises:
        OutputError: the folder exists.
        RecipeError: an unfinished training of something else is in the way.
        StoppedError: it was asked to stop.
    """
    group = group or Group()
    began = time.perf_counter()

    def export(step: int) -> None:
        save_draft(plan.draft, out.with_name(f"{out.name}.step-{step}"), replace=True)

    def look(step: int) -> dict[str, Any]:
        return {} if target is None or not plan.prompts else {"measured": acceptance(plan.draft, plan.heads, target, plan.prompts)}

    training = DraftTraining(
        plan.draft, plan.heads, plan.source, plan.options, batch=plan.batch, validation=plan.validation, every=plan.every, look=look, export=export,
        export_every=plan.export_every, group=group, in_parts=plan.in_parts,
    )  # fmt: skip
    with ExitStack() as stack:
        work = stack.enter_context(Workdir(out, None, replace)) if group.rank == 0 else None
        if work is not None:
            config = plan.draft.config.model_dump(mode="json")
            found = work.begin({"draft": _digest(config), "batch": plan.batch, **plan.options.model_dump(mode="json"), **plan.inputs})
            if not found:
                work.record(begun=True)  # from here on a stopped run is kept
        states = Path(group.share(str(work.path / "states") if work is not None else ""))
        history = training.run(states, progress, stop_requested)
        last = history.entries[-1] if history.entries else {}
        document = {
            "steps": training.training.step, "tokens_per_second": history.tokens_per_second, "seconds": time.perf_counter() - began,
            "peak_gpu_bytes": peak_gpu_bytes(), "parameters": sum(p.numel() for p in plan.draft.parameters()), **{k: v for k, v in last.items() if k != "step"},
        }  # fmt: skip
        if work is not None:
            write_draft(plan.draft, work.stage)
            write_json(
                work.stage / "training.json",
                {**document, "options": plan.options.model_dump(mode="json"), "batch": plan.batch, **plan.inputs, "history": history.entries},
            )
            work.publish()
    return document


def acceptance(draft: Draft, heads: Heads, target: Target, prompts: Sequence[Sequence[int]], k: int = 5) -> dict[str, Any]:
    """Acceptance of a draft, measured by decoding greedily: tokens a round, the target's own counted."""
    from ..generation import generate

    k = min(k, getattr(draft.config, "num_tokens", k))
    rounds = accepted = 0
    for start in range(0, len(prompts), _PROBE_ROWS):
        part = prompts[start : start + _PROBE_ROWS]
        ids, mask = _padded(part, target.device)
        with torch.no_grad():
            found = generate(target, ids, draft.drafter(heads), PROBE_TOKENS, k=k, attention_mask=mask)
        rounds += sum(found.decoded.rounds)
        accepted += found.decoded.accepted
    return {"acceptance_length": 1 + accepted / rounds if rounds else 1.0, "k": k, "prompts": len(prompts), "tokens_each": PROBE_TOKENS}


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
