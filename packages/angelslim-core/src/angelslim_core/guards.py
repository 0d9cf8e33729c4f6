"""What a run checks of its surroundings, and of what it wrote before that is published."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device import is_out_of_memory, peak_ram_bytes
from .errors import NumericError, ResourceError
from .io.checkpoint import Checkpoint, read_header

if TYPE_CHECKING:
    from .plan import Plan
    from .recipe import Recipe
    from .workdir import Workdir


def check_ram(plan: Plan, recipe: Recipe) -> None:
    """Raise ResourceError if the plan needs more memory than the recipe allows."""
    limit = recipe.runtime.max_ram_bytes
    if limit is not None and plan.peak_ram_bytes > limit:
        raise ResourceError(4, recipe.where("runtime.max_ram"), f"the plan needs about {plan.peak_ram_bytes} bytes of RAM, {limit} are allowed")


def check_disk(plan: Plan, workdir: Workdir) -> None:
    """Raise ResourceError unless the output, and the layers or the trained model and its states kept until it is written, fit on the disk."""
    needed = int(plan.bytes_after * 1.1) + (plan.bytes_after if plan.layer_steps else 0)
    if plan.source.trained:
        needed += 2 * plan.bytes_before + plan.training_bytes[1]
    free = shutil.disk_usage(workdir.path).free
    if free < needed:
        raise ResourceError(3, str(workdir.out), f"needs {needed} bytes of disk, {free} are free", "free space or choose another --out")


def verify_written(stage: Path, plan: Plan) -> None:
    """Reopen what was written: headers as planned, every source tensor accounted for."""
    written = Checkpoint.open(stage).tensors
    planned = {n: spec for unit in plan.units for n, spec in unit.outputs.items()}
    wrong = [n for n in planned if n not in written or (written[n].dtype, written[n].shape) != (planned[n].dtype, planned[n].shape)]
    if wrong or len(written) != len(planned):
        raise NumericError(4, wrong[0] if wrong else str(stage.name), "was not written as planned")
    for path in stage.glob("*.safetensors"):
        read_header(path)


def check_gates(recipe: Recipe, evaluation: Mapping[str, Any]) -> None:
    """Raise NumericError if what was measured misses a gate of the recipe."""
    gates = recipe.gates
    if gates is None:
        return
    for name, limit, better in (("kl", gates.max_kl, "<="), ("top1_agreement", gates.min_top1, ">=")):
        if limit is None:
            continue
        value = evaluation[name]
        if not (value <= limit if better == "<=" else value >= limit):
            raise NumericError(
                5, recipe.where("gates"), f"{name} is {value:.4g}, the gate asks for {better} {limit}", "nothing was written; choose a milder scheme"
            )


@contextmanager
def memory_errors(plan: Plan) -> Iterator[None]:
    """Turn running out of memory, which torch reports as a RuntimeError, into an error of ours; the work is kept."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"memory ran out at {peak_ram_bytes()} bytes; the plan expected to need {plan.peak_ram_bytes}"
        raise ResourceError(2, str(plan.source.checkpoint.folder), what, "give it more memory and run the same command again") from error
