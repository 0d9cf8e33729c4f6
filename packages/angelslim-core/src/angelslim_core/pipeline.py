"""Recipe -> Plan -> passes -> published folder: what `compress` and `angelslim run` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters.base import Description
from .analysis import merged_reports, summarized, summary, warnings_of
from .artifact import Artifact, complete, fingerprint, write_records
from .context import Context, Progress, never, silent
from .device import device_name, free_ram_bytes, peaks, pick_device, release_ram
from .errors import ModelError, NumericError, UsageError
from .evaluation import check_evaluation
from .guards import check_disk, check_gates, check_ram, memory_errors, verify_written
from .io.hub import resolve
from .io.read_ahead import ReadAhead
from .io.writer import disk_errors
from .kv_cache import trained_scales
from .model_training import rewritten, train_model
from .parallel import Group, is_first, joined
from .passes import LayerPass, ModelPass, Pass, RuntimePass, SourcePass, WeightPass
from .plan import Plan, Step, make_plan
from .plugins import PluginHost, required_plugins
from .recipe import Recipe, bind_options, load_recipe, steps_from_use
from .source import Source, open_source
from .stream import write_shards
from .workdir import Workdir, is_unfinished

if TYPE_CHECKING:
    from .calibration.data import Samples
    from .sweep import Sweep


@dataclass
class Result:
    """What a run did; `as_dict` is the `--json` document of `angelslim run`."""

    path: Path
    passes: list[dict[str, Any]]
    bytes_before: int
    bytes_after: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    resumed_layers: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    peak_ram_bytes: int = 0  # of the process that took most
    peak_gpu_bytes: int = 0  # likewise, of its GPU; 0 without one

    def __post_init__(self) -> None:
        self.path = Path(self.path)

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "passes": self.passes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "warnings": self.warnings,
            "fallbacks": len(self.fallbacks),
            "resumed_layers": self.resumed_layers,
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_gpu_bytes": self.peak_gpu_bytes,
            "processes": self.processes,
            "seconds": round(self.seconds, 3),
            "metrics": self.metrics,
        }


def compress(
    model: str | Path | None = None,
    use: Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    recipe: str | Path | Mapping[str, Any] | None = None,
    plugins: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    device: str | None = None,
    replace: bool = False,
    host: PluginHost | None = None,
    progress: Progress = silent,
    stop_requested: Callable[[], bool] = never,
) -> Result:
    """Compress a model into a new folder.

    Args:
        model: model folder, or a hub id when online; overrides the recipe's.
        use: pass ids in order with default options, instead of a recipe.
        out: folder to create; overrides the recipe's.
        recipe: YAML file, name of a shipped recipe, or its content.
        plugins: plugins to load; with neither `use` nor `recipe`, their default presets run.
        overrides: "path=value" as for `--set`.
        replace: an existing output is replaced once the new one is complete.
        progress: called as progress(done, total, label).
        stop_requested: asked between items; true ends the run safely.

    Raises:
        AngelslimError: with a stable code; nothing is left at `out`.
    """
    start = time.perf_counter()
    with ReadAhead(free_ram_bytes() // 4 if is_first() and not (out and is_unfinished(Path(out))) else 0) as ahead:
        prepared = prepare(
            model, use, out, recipe=recipe, plugins=plugins, overrides=overrides, seed=seed, device=device, host=host, found=ahead.start
        )  # fmt: skip
        if prepared.out is None:
            raise UsageError(1, "--out", "no output folder is given", "name one by --out, or export.to in the recipe")
        return _execute(prepared, replace, progress, stop_requested, start)


@dataclass
class Prepared:
    """A recipe bound to a model: everything that is known before work starts.

    Args:
        original: the model as it is stored; `source` is as the recipe's source passes read it.
    """

    recipe: Recipe
    host: PluginHost
    passes: list[Pass]
    source: Source
    description: Description
    plan: Plan
    out: Path | None
    device: str
    original: Source


def prepare(
    model: str | Path | None = None,
    use: Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    recipe: str | Path | Mapping[str, Any] | None = None,
    plugins: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    device: str | None = None,
    host: PluginHost | None = None,
    found: Callable[[str | Path | None], None] = lambda _: None,
) -> Prepared:
    """Load plugins, bind options, read headers and plan; reads no weight. Arguments as for `compress`.

    Args:
        found: called, before torch is loaded, with the model's folder or hub id as soon as it is known, unchecked, or None.
    """
    host = host or PluginHost()
    if recipe is not None and use:
        raise UsageError(2, "--use", "a recipe and --use exclude each other", "add the step to the recipe")
    found(model)
    if recipe is not None:
        bound = load_recipe(recipe, overrides=overrides)
    elif use:
        bound = steps_from_use(list(use), overrides)
    elif plugins:
        host.load(plugins)
        bound = load_recipe({"steps": host.default_steps(plugins, device_name(pick_device(device or "auto")), model)}, overrides=overrides)
    else:
        raise UsageError(3, "run", "nothing to do", "give a recipe, --use PASS_ID, or --plugins for their default presets")
    path = model if model is not None else bound.model.path
    found(path)
    host.load(required_plugins([s.use for s in bound.steps], plugins or ()))
    passes = []
    for index, step in enumerate(bound.steps):
        pass_class = host.registry.find_pass(step.use, bound.where(f"steps[{index}].use"))
        passes.append(pass_class.bind(bind_options(index, bound, pass_class)))
    if path is None:
        raise UsageError(4, "--model", "no model is given", "name one by --model, or model.path in the recipe")
    if seed is not None:
        bound = bound.model_copy(update={"runtime": bound.runtime.model_copy(update={"seed": seed})})
    # the recipe in the records names the model that was used
    bound = bound.model_copy(update={"model": bound.model.model_copy(update={"path": str(path)})})
    original = open_source(resolve(path), host.registry.exporters.values())
    chosen = pick_device(device or bound.runtime.device)
    source, description = rewritten(original, passes, host, chosen, bound.runtime.seed)
    if any(p.needs_calibration for p in passes) and bound.calibration is None:
        index = next(i for i, p in enumerate(passes) if p.needs_calibration)
        raise UsageError(5, bound.where(f"steps[{index}]"), f"{passes[index].id} needs calibration data", "--set calibration.data=FILE, or =self")
    plan = make_plan(bound, passes, source, description, host.registry.exporters, chosen)
    host.hook.angelslim_modify_plan(plan=plan)
    target = out if out is not None else bound.export.to
    return Prepared(bound, host, passes, source, plan.description, plan, None if target is None else Path(target), chosen, original)


def _execute(prepared: Prepared, replace: bool, progress: Progress, stop: Callable[[], bool], start: float) -> Result:
    recipe, plan, host = prepared.recipe, prepared.plan, prepared.host
    assert prepared.out is not None
    check_ram(plan, recipe)
    check_evaluation(recipe, prepared.source.checkpoint)
    with joined(prepared.device) as group:
        if group.rank:
            with memory_errors(plan), disk_errors(prepared.out, plan.bytes_after):
                context = _context(prepared, Path(group.share(None)), group, silent, stop)
                final, *_ = _calibrated(prepared, context, None, Timer(host, context))
                write_shards(final, context, [], [])
                return Result(**group.share(None))
        result = _write(prepared, group, replace, progress, stop, start)
        return Result(**group.share(vars(result) | {"path": str(result.path)}))


def _write(prepared: Prepared, group: Group, replace: bool, progress: Progress, stop: Callable[[], bool], start: float) -> Result:
    """The run, in the first of its processes."""
    recipe, plan, host = prepared.recipe, prepared.plan, prepared.host
    assert prepared.out is not None
    with (
        Workdir(prepared.out, prepared.source.checkpoint.folder, replace) as workdir,
        group.telling(),  # before the work folder goes, in which the others write
        memory_errors(plan),
        disk_errors(prepared.out, plan.bytes_after),
    ):
        check_disk(plan, workdir)
        context = _context(prepared, Path(group.share(str(workdir.path))), group, progress, stop)
        timer = Timer(host, context)
        plan, journal, policies, sweep = _calibrated(prepared, context, workdir, timer)
        metrics, layers = dict(sweep.metrics), sweep.analysis
        timer.reports.update({i: merged_reports(r) for i, r in sweep.reports.items()})
        streaming = time.perf_counter()
        trained = [trained_scales(context.workdir)] if plan.trains_cache else []
        written = write_shards(plan, context, journal, [*sorted(set(sweep.files.values())), *trained])
        metrics.update(written.metrics)
        timer.share([s for s in plan.steps if not isinstance(s.pass_, RuntimePass | ModelPass)], time.perf_counter() - streaming)
        timer.reports.update({s.index: plan.source.reports[s.pass_.id] for s in plan.steps if isinstance(s.pass_, SourcePass)})
        for step in plan.steps:
            if isinstance(step.pass_, WeightPass):
                own = {s.name: metrics[s.name] for s in step.sites if s.name in metrics}
                timer.reports[step.index] = {**timer.reports.get(step.index, {}), **step.pass_.findings(own)}
        timer.reports.update(complete(workdir.stage, plan, host, context, timer.run))
        passes = [timer.entry(s, metrics) for s in plan.steps]
        after = sum(p.stat().st_size for p in workdir.stage.glob("*.safetensors"))
        before = sum({i.file: i.file.stat().st_size for i in prepared.source.checkpoint.tensors.values()}.values())
        analysis = summarized(plan, metrics, layers)
        context.warnings += warnings_of(analysis, plan)
        artifact = Artifact(workdir.stage, plan, passes, metrics, policies, context, analysis, written.digests)
        evaluation = write_records(artifact, host, before, after, start)
        verify_written(workdir.stage, plan)
        check_gates(recipe, evaluation)
        workdir.publish()
    artifact.path = prepared.out
    host.hook.angelslim_run_finished(artifact=artifact)
    return Result(
        prepared.out, passes, before, after, time.perf_counter() - start, context.warnings, context.fallbacks, sweep.resumed_layers,
        {**summary(metrics), **evaluation}, plan.as_dict(), group.size, *map(max, written.peaks, peaks()),
    )  # fmt: skip


def _context(prepared: Prepared, workdir: Path, group: Group, progress: Progress, stop: Callable[[], bool]) -> Context:
    recipe, plan = prepared.recipe, prepared.plan
    return Context(
        prepared.source, prepared.description, prepared.device, recipe.runtime.seed, workdir,
        batch_size=recipe.calibration.batch_size if recipe.calibration else 1, progress=progress, stop_requested=stop,
        warnings=list(plan.warnings), group=group, spills=plan.spills,
    )  # fmt: skip


def _calibrated(prepared: Prepared, context: Context, workdir: Workdir | None, timer: Timer) -> tuple[Plan, list[dict[str, Any]], list[dict[str, Any]], Sweep]:
    """What all processes of a run do: whatever looks at the model as a whole or at calibration data.

    Args:
        workdir: of the first process; None in the others.

    Returns:
        the final plan, the journal of an unfinished run, the policies of runtime passes, what the sweep found.
    """
    from .sweep import Sweep, run_sweep

    plan = prepared.plan
    if prepared.recipe.calibration and any(p.needs_calibration for p in prepared.passes):
        calibrate(prepared, context)
    journal = workdir.begin(fingerprint(plan, prepared.host, context)) if workdir else []
    if any(isinstance(p, ModelPass) for p in prepared.passes):
        with workdir.keeping(NumericError) if workdir else nullcontext():  # what a training that diverged has kept
            plan = train_model(prepared, context, timer)
        context.source, context.description = plan.source, plan.description
    plan = _measure(prepared, plan, context, timer)
    for step in plan.steps:
        if hasattr(step.pass_, "prepare"):
            step.pass_.prepare(context)
    policies = [
        {"pass": s.pass_.id, "policy": dict(timer.run(s, lambda s=s: s.pass_.policy(context)))}  # type: ignore[attr-defined,misc]
        for s in plan.steps
        if isinstance(s.pass_, RuntimePass)
    ]
    sweep = run_sweep(plan, context, workdir, journal, timer.run) if plan.layer_steps else Sweep()
    return plan, journal, policies, sweep


class Timer:
    """Runs passes through the hook, which plugins may wrap, and keeps their seconds and reports."""

    def __init__(self, host: PluginHost, context: Context) -> None:
        self.host, self.context = host, context
        self.seconds: dict[int, float] = {}
        self.reports: dict[int, dict[str, Any]] = {}

    def run(self, step: Step, execute: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return self.host.hook.angelslim_run_pass(pass_=step.pass_, context=self.context, execute=execute)
        finally:
            self.seconds[step.index] = self.seconds.get(step.index, 0.0) + time.perf_counter() - start

    def share(self, steps: Sequence[Step], seconds: float) -> None:
        """Streaming interleaves the steps, so its time is divided evenly."""
        for step in steps:
            self.seconds[step.index] = self.seconds.get(step.index, 0.0) + seconds / len(steps)

    def entry(self, step: Step, metrics: Mapping[str, Any]) -> dict[str, Any]:
        names = {site.name for site in step.sites if step.pass_.claims}  # others leave the storing to a later step
        own = {k: v for k, v in metrics.items() if k in names}
        return {"id": step.pass_.id, "seconds": round(self.seconds.get(step.index, 0.0), 3), "metrics": {**summary(own), **self.reports.get(step.index, {})}}


def _measure(prepared: Prepared, plan: Plan, context: Context, timer: Timer) -> Plan:
    """The plan after every layer pass has learned of the model what decides its schemes."""
    passes = [s.pass_ for s in plan.steps]
    for step in plan.layer_steps:
        pass_ = step.pass_
        assert isinstance(pass_, LayerPass)
        if type(pass_).measure is not LayerPass.measure:
            passes[step.index] = timer.run(step, lambda step=step, pass_=pass_: pass_.measure(step.sites, context))  # type: ignore[misc]
    if all(new is s.pass_ for new, s in zip(passes, plan.steps, strict=True)):
        return plan
    return make_plan(prepared.recipe, passes, plan.source, plan.description, prepared.host.registry.exporters, prepared.device)


def calibrate(prepared: Prepared, context: Context) -> None:
    """Load the calibration samples that the recipe names into `context`; the first process does so for all.

    Raises:
        UsageError: there are fewer batches than processes.
    """
    from .calibration.data import Samples

    group = context.group
    found = _samples(prepared, context.seed) if group.rank == 0 else Samples([])
    release_ram()  # a tokenizer's
    ids, warnings = group.share([found.ids, found.warnings])
    context.samples = Samples(ids, warnings)
    context.warnings += warnings
    number = -(-len(ids) // context.batch_size)
    if number < group.size:
        raise UsageError(310, "torchrun", f"{group.size} processes share {number} batches of calibration samples", "lower calibration.batch_size")


def _samples(prepared: Prepared, seed: int) -> Samples:
    from .calibration.data import load_samples, self_samples
    from .loading import load_model, load_tokenizer

    calibration = prepared.recipe.calibration
    assert calibration is not None
    folder = prepared.source.checkpoint.folder
    if not prepared.source.checkpoint.has_tokenizer:
        raise ModelError(88, str(folder), "has no tokenizer, which calibration text needs", "copy the tokenizer files into the model folder")
    tokenizer = load_tokenizer(folder)

    def generate(num: int, tokens: int, seed: int) -> list[list[int]]:
        loaded = load_model(folder, prepared.device, host=prepared.host)
        return self_samples(loaded.model, tokenizer, num, tokens, seed)

    return load_samples(calibration, tokenizer, seed, generate)
