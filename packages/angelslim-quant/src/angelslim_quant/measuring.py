"""Sensitivities of a model to a file: what `angelslim quant sensitivity` does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from angelslim_core.artifact import fingerprint
from angelslim_core.context import Context, Progress, silent
from angelslim_core.errors import UsageError
from angelslim_core.io.writer import write_json
from angelslim_core.pipeline import calibrate, prepare
from angelslim_core.plugins import PluginHost
from angelslim_core.workdir import Workdir

from .passes.mixed import Mixed


def measure_model(
    model: str | Path, out: str | Path, calibration: Mapping[str, Any], options: Mapping[str, Any], *, seed: int = 0, device: str = "auto",
    replace: bool = False, progress: Progress = silent, host: PluginHost | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the file that `quant.mixed` reads as `sensitivity`; returns what it holds, and what uniform choices would cost.

    Args:
        calibration: section of a recipe.
        options: of quant.mixed.
        replace: an existing file is replaced once the new one is complete.

    Raises:
        AngelslimError: with a stable code; nothing is left at `out`.
    """
    if Path(out).is_dir():
        raise UsageError(342, "--out", f"{out} is a folder", "name a file")
    # no budget is too small for this
    recipe = {"calibration": dict(calibration), "steps": [{"use": Mixed.id, "with": {**options, "bits": 64}}]}
    prepared = prepare(model, recipe=recipe, seed=seed, device=device, host=host)
    (step,) = prepared.plan.steps
    pass_ = step.pass_
    assert isinstance(pass_, Mixed)
    with Workdir(Path(out), prepared.source.checkpoint.folder, replace) as workdir:
        context = Context(
            prepared.source, prepared.description, prepared.device, seed, workdir.path, batch_size=calibration.get("batch_size", 1), progress=progress
        )
        calibrate(prepared, context)
        workdir.begin(fingerprint(prepared.plan, prepared.host, context))
        found = pass_.sensitivities(step.sites, context)
        write_json(workdir.out, found.model_dump(mode="json"))
        shutil.rmtree(workdir.path)
    measured = Mixed(pass_.config, found).settle(step.sites, prepared.source)
    return {"path": str(out), "warnings": context.warnings, "tokens": found.tokens, **{k: measured.findings({})[k] for k in ("uniform", "units")}}
