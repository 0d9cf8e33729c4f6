"""Recipe and headers -> Plan: what will happen to every tensor, before any weight is read.

Whatever can be known from headers fails here: unknown options, rules that match nothing, shapes that do not divide,
two steps that quantize one linear, engines that will refuse the result.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .adapters.base import Description, Site, select
from .device import free_ram_bytes
from .engines import verdicts
from .errors import EngineError, PlanError
from .exporters import Exporter
from .io.checkpoint import DTYPES, FLOATS, TensorSpec
from .io.writer import spec_bytes, split_shards
from .kv_cache import cache_outputs, settled_cache
from .order import after_training, check_order, training_bytes
from .passes import Kind, LayerPass, Pass, RuntimePass, SourcePass, TensorPass, TrainedPass, WeightPass
from .schemes import CacheScheme, Scheme

if TYPE_CHECKING:
    from .recipe import Recipe
    from .source import Source

# resident memory of the interpreter with torch loaded, and of transformers with an empty model on top, bytes (measured, CPU build)
BASE_RAM = 300 << 20
MODEL_RAM = 70 << 20


@dataclass(frozen=True)
class Step:
    """A pass bound to its options and to the linears it treats (none for model and runtime passes)."""

    index: int
    pass_: Pass
    sites: tuple[Site, ...] = ()


@dataclass(frozen=True)
class Unit:
    """Tensors that are read and written together: a copy, one linear, or one fused set.

    Args:
        sites: the linears, empty for a copy.
        steps: indices of the tensor and layer steps that treat them.
        tensors: source tensors read.
        outputs: tensor name -> what is written.
    """

    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    tensors: tuple[str, ...]
    outputs: Mapping[str, TensorSpec]


@dataclass
class Plan:
    """What a run will do; `as_dict` is what `--dry-run` shows."""

    recipe: Recipe
    source: Source
    description: Description
    steps: list[Step]
    units: list[Unit]
    shards: list[list[int]]
    schemes: dict[str, Scheme]
    ignore: list[str]
    exporter: Exporter | None
    engines: dict[str, dict[str, Any]]
    peak_ram_bytes: int
    cache: CacheScheme | None = None
    spills: bool = False
    training_bytes: tuple[int, int] = (0, 0)  # of memory, of disk; see `order.training_bytes`
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return self.source.checkpoint.nbytes

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(spec_bytes(spec) for unit in self.units for spec in unit.outputs.values())

    @property
    def trains_cache(self) -> bool:
        """Whether the scales of the KV cache are trained."""
        return any(isinstance(s.pass_, TrainedPass) and s.pass_.cache for s in self.steps)

    @property
    def layer_steps(self) -> list[Step]:
        return [s for s in self.steps if isinstance(s.pass_, LayerPass)]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `tensors` lists every source tensor and what becomes of it."""
        rows = []
        for unit in self.units:
            for name in dict.fromkeys(unit.tensors):
                sites = [s for s in unit.sites if s.tensor == name]
                scheme = next((self.schemes[s.name].name for s in sites if s.name in self.schemes), None)
                action = scheme or ("transform" if name in self.source.changed else "train" if name in self.source.trained else "copy")
                rows.append({"tensor": name, "shape": list(self.source.shapes[name]), "action": action, "linears": len(sites)})
        return {
            "plan": [
                {
                    "pass": s.pass_.id,
                    "kind": s.pass_.kind.value,
                    "tensors": self.source.reports[s.pass_.id]["tensors"] if isinstance(s.pass_, SourcePass) else len(s.sites),
                    "options": s.pass_.config.model_dump(mode="json"),
                }
                for s in self.steps
            ],
            "tensors": rows,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "peak_ram_bytes": self.peak_ram_bytes,
            "hidden_states": "files" if self.spills else "memory",
            "shards": len(self.shards),
            "kv_cache": self.cache.name if self.cache else None,
            "export": self.exporter.name if self.exporter else None,
            "engines": self.engines,
            "problems": self.problems,
            "warnings": self.warnings,
        }


def make_plan(recipe: Recipe, passes: Sequence[Pass], source: Source, description: Description, exporters: Mapping[str, type[Exporter]], device: str) -> Plan:
    """Plan a recipe for a model.

    Args:
        passes: one bound pass per step of the recipe.
        exporters: known layouts by name.
        device: "cpu" or "cuda".

    Raises:
        PlanError: the recipe does not fit the model, or its steps do not fit each other.
        EngineError: `export.engines` names an engine that will refuse the result.
    """
    check_order(recipe, passes)
    description = _for_layout(description, exporters.get(recipe.export.format))
    cache = settled_cache(recipe, passes, description)
    steps = [_step(recipe, i, p, description, source) for i, p in enumerate(passes)]
    schemes = _schemes(recipe, steps)
    _check_fused(description, schemes)
    source = after_training(recipe, steps, source, description)
    exporter = _exporter(recipe, source, schemes, cache, exporters)
    units = _units(source, description, steps, schemes, exporter)
    units += [Unit((), (), (), outputs) for outputs in cache_outputs(source.config, description, cache)]
    shards = split_shards([u.outputs for u in units], recipe.export.max_shard_bytes)
    plan = Plan(recipe, source, description, steps, units, shards, schemes, left_alone(source, description, schemes), exporter, {}, 0, cache)
    plan.warnings += source.warnings
    plan.problems += [line for s in steps if isinstance(s.pass_, WeightPass) for line in s.pass_.open_questions()]
    if recipe.calibration and not any(s.pass_.needs_calibration for s in steps):
        plan.warnings.append("calibration is given, but no step uses it")
    _check_gates(plan)
    if source.trained:
        plan.training_bytes = training_bytes(steps, source)
        where = "memory" if device == "cpu" else "GPU memory"
        parts = "weights, and of what is trained gradients, fp32 copies, Adam's moments and a teacher"
        plan.problems.append(f"training takes about {plan.training_bytes[0]} bytes of {where} for {parts}, and activations on top")
    plan.peak_ram_bytes, plan.spills = _peak_ram(plan, device)
    limit = recipe.runtime.max_ram_bytes
    if limit is not None and plan.peak_ram_bytes > limit:
        plan.problems.append(f"about {plan.peak_ram_bytes} bytes of RAM are needed, runtime.max_ram allows {limit}")
    plan.engines = verdicts(plan)
    for engine in recipe.export.engines:
        verdict = plan.engines.get(engine)
        if verdict is None:
            raise EngineError(2, recipe.where("export.engines"), f"unknown engine {engine!r}", f"known: {', '.join(plan.engines)}")
        if not verdict["ok"]:
            raise EngineError(3, engine, f"will not load this result: {verdict['why']}", "change the scheme, or drop the engine from export.engines")
    return plan


def _check_gates(plan: Plan) -> None:
    gates, where = plan.recipe.gates, plan.recipe.where("gates.min_expert_tokens")
    if gates is None or gates.min_expert_tokens is None:
        return
    if not any(site.expert is not None for site in plan.description.sites):
        raise PlanError(390, where, "this model has no routed experts", "drop the gate")
    if not plan.layer_steps:
        raise PlanError(391, where, "no step is calibrated, so no token is routed", "drop the gate, or use a calibrated pass")


def left_alone(source: Source, description: Description, quantized: Container[str]) -> list[str]:
    """What stays as it is, by name or pattern: linears, MTP layers, a tied head, towers."""
    mtp = [n.removesuffix(".weight") for n in source.dtypes if n in description.mtp_tensors and n.endswith(".weight") and len(source.shapes[n]) == 2]
    return [s.name for s in description.sites if s.name not in quantized] + mtp + _tied_head(source, description) + _towers(source, description)


def _for_layout(description: Description, exporter: type[Exporter] | None) -> Description:
    """Tell every site what the layout asked for prescribes, so that passes search with the scales that are stored."""
    if exporter is None or exporter.scale_dtype is None:
        return description
    return replace(description, sites=tuple(replace(site, scale_dtype=exporter.scale_dtype) for site in description.sites))


def _step(recipe: Recipe, index: int, pass_: Pass, description: Description, source: Source) -> Step:
    if not isinstance(pass_, WeightPass):
        return Step(index, pass_)
    sites = tuple(_targets(recipe, index, pass_, description, source))
    with _placed(recipe, index):
        return Step(index, pass_.settle(sites, source), sites)


@contextmanager
def _placed(recipe: Recipe, index: int) -> Iterator[None]:
    """Errors of a pass about a linear also say where its step stands in the recipe."""
    try:
        yield
    except PlanError as error:
        where = recipe.where(f"steps[{index}]")
        raise PlanError(error.number, where, f"{error.where}: {error.what}" if error.where else error.what, error.hint) from error


def _targets(recipe: Recipe, index: int, pass_: Pass, description: Description, source: Source) -> list[Site]:
    step = recipe.steps[index]
    where = recipe.where(f"steps[{index}]")
    usable = [s for s in description.sites if s.dtype in FLOATS]
    if step.targets is None:
        found = {s.name for selector in pass_.default_targets for s in select(usable, [selector], where, optional=True)}
        chosen = [s for s in usable if s.name in found]
    else:
        chosen = select(usable, step.targets, recipe.where(f"steps[{index}].targets"), step.optional)
    tied = set(_tied_head(source, description))
    rules = [rule for rule in step.ignore if rule not in tied]
    ignored = {s.name for s in select(usable, rules, recipe.where(f"steps[{index}].ignore"), step.optional)}
    chosen = [s for s in chosen if s.name not in ignored]
    if not chosen and not step.optional:
        raise PlanError(7, where, f"{pass_.id} has no linear to work on in this model")
    return chosen


def _schemes(recipe: Recipe, steps: Sequence[Step]) -> dict[str, Scheme]:
    schemes: dict[str, Scheme] = {}
    owner: dict[tuple[str, str], Step] = {}
    for step in steps:
        if not isinstance(step.pass_, WeightPass):
            continue
        for site in step.sites:
            for claim in step.pass_.claims:
                first = owner.setdefault((site.name, claim), step)
                if first is not step or site.name in schemes:
                    where = recipe.where(f"steps[{step.index}]")
                    raise PlanError(
                        8,
                        where,
                        f"{step.pass_.id} and {first.pass_.id} (step {first.index}) both set {claim} of {site.name}",
                        "give the steps disjoint `targets`",
                    )
            with _placed(recipe, step.index):
                scheme = step.pass_.scheme(site)
            if scheme is not None:
                schemes[site.name] = scheme
    return schemes


def _check_fused(description: Description, schemes: Mapping[str, Scheme]) -> None:
    first: dict[str, Site] = {}
    for site in description.sites:
        if site.fused is None:
            continue
        other = first.setdefault(site.fused, site)
        if schemes.get(other.name) != schemes.get(site.name):
            raise PlanError(9, site.name, f"would be stored otherwise than {other.name}, but engines run both as one matmul", "target or ignore them together")


def _exporter(
    recipe: Recipe, source: Source, schemes: Mapping[str, Scheme], cache: CacheScheme | None, exporters: Mapping[str, type[Exporter]]
) -> Exporter | None:  # fmt: skip
    wanted, where = recipe.export.format, recipe.where("export.format")
    if wanted != "auto" and wanted not in exporters:
        raise PlanError(10, where, f"no exporter {wanted!r}", f"known: {', '.join(sorted(exporters))}")
    distinct: list[Scheme | CacheScheme] = [*dict.fromkeys(schemes.values()), *([cache] if cache else [])]
    if not distinct and not source.transforms:
        return None
    layouts = [name for name, exporter in exporters.items() if exporter.transforms]
    if source.transforms and wanted not in ("auto", *layouts):
        hint = "export.format: compressed-tensors has, or drop what adds them (r4 of quant.rotate)"
        raise PlanError(379, where, f"{wanted} has no place for matrices that linears multiply their inputs by", hint)
    if source.transforms:
        exporters = {name: exporters[name] for name in layouts}
    if not distinct:
        return exporters[layouts[0] if wanted == "auto" else wanted]()
    common = [e for e in distinct[0].exporters if all(e in s.exporters for s in distinct) and e in exporters]
    # several block sizes or schemes need a layout with groups
    if len(distinct) > 1 and any(exporters[e].groups for e in common):
        common = [e for e in common if exporters[e].groups]
    if wanted != "auto":
        common = [e for e in common if e == wanted]
    if not common:
        names = ", ".join(s.name for s in distinct)
        raise PlanError(11, where, f"no {'layout' if wanted == 'auto' else wanted + ' layout'} holds {names} in one folder")
    return exporters[common[0]]()


def _units(source: Source, description: Description, steps: Sequence[Step], schemes: Mapping[str, Scheme], exporter: Exporter | None) -> list[Unit]:
    of_tensor: dict[str, list[Site]] = {}
    for site in description.sites:
        of_tensor.setdefault(site.tensor, []).append(site)
    of_fused: dict[str, list[Site]] = {}
    for site in description.sites:
        if site.fused:
            of_fused.setdefault(site.fused, []).append(site)
    treated: dict[str, list[int]] = {}
    joined: set[str] = set()
    for step in steps:
        if isinstance(step.pass_, WeightPass) and step.pass_.cache and not isinstance(step.pass_, TrainedPass):
            continue
        joins = isinstance(step.pass_, TensorPass) and step.pass_.joins_fused
        for site in step.sites:
            treated.setdefault(site.name, []).append(step.index)
            if joins and site.fused:
                joined.add(site.fused)
    units: list[Unit] = []
    done: set[str] = set()
    for tensor in source.dtypes:
        sites = of_tensor.get(tensor, [])
        # a stacked tensor is written as separate linears as soon as one of them is quantized
        if not any(s.name in treated for s in sites) or (sites[0].part and not any(s.name in schemes for s in sites)):
            steps_of = tuple(dict.fromkeys(i for s in sites for i in treated.get(s.name, ())))
            units.append(Unit(tuple(sites) if steps_of else (), steps_of, (tensor,), {tensor: TensorSpec(source.dtypes[tensor], source.shapes[tensor])}))
            continue
        for site in sites:
            if site.name in done:
                continue
            members = of_fused[site.fused] if site.fused in joined and site.fused else [site]
            done.update(m.name for m in members)
            outputs = {n: spec for m in members for n, spec in _outputs(m, schemes, exporter).items()}
            used = tuple(dict.fromkeys(i for m in members for i in treated.get(m.name, ())))
            units.append(Unit(tuple(members), used, tuple(dict.fromkeys(m.tensor for m in members)), outputs))
    return [u for u in units if u.outputs]


def _outputs(site: Site, schemes: Mapping[str, Scheme], exporter: Exporter | None) -> dict[str, TensorSpec]:
    scheme = schemes.get(site.name)
    if scheme is None:
        return {f"{site.name}.weight": TensorSpec(site.dtype, site.shape)}
    assert exporter
    return {f"{site.name}.{suffix}": spec for suffix, spec in exporter.layout(site.shape, scheme).items()}


def _tied_head(source: Source, description: Description) -> list[str]:
    """The head's module name where its weight is the embedding's and not in the checkpoint."""
    return [] if any(s.role == "head" for s in description.sites) else ["lm_head"]


def _towers(source: Source, description: Description) -> list[str]:
    """Patterns for what lies beside the language model: readers load it under prefixes that the checkpoint does not have."""
    beside = {part for name in source.dtypes for part in name.split(".")[:2]}
    return [f"re:.*{tower}.*" for tower in description.layout.towers if tower in beside]


def _peak_ram(plan: Plan, device: str) -> tuple[int, bool]:
    """Peak of memory, and whether hidden states between layers stay in files: for a CPU, which reads those as fast, or for want of memory.

    It is that of the interpreter with the largest unit as read, in fp32 and twice as scratch, or of a layer pass: the
    embedding, or the largest layer with second moments of its widest input and a batch's forward pass.
    """
    source = plan.source
    largest = 0
    for unit in plan.units:
        read = sum(s.shape[0] * s.shape[1] for s in unit.sites) if unit.sites else 0
        copied = sum(spec_bytes(s) for s in unit.outputs.values())
        scratch = max((source.scratch(name) for name in unit.tensors), default=0)
        beside = sum(isinstance(p := plan.steps[i].pass_, TensorPass) and p.fetches for i in unit.steps)  # as large as the weights, in BF16
        largest = max(largest, (read * (14 + 2 * beside) + copied if unit.steps else copied) + scratch)
    peak, spills = BASE_RAM + largest, False
    calibration = plan.recipe.calibration
    if plan.layer_steps and calibration:
        per_layer: dict[int | None, int] = {}
        for site in plan.description.sites:
            per_layer[site.layer] = per_layer.get(site.layer, 0) + site.shape[0] * site.shape[1]
        layer = max(size for index, size in per_layer.items() if index is not None)
        embedding = max(source.nbytes(name) for name in source.dtypes)
        width = max(s.shape[1] for s in plan.description.sites)
        work = layer * 8 + 20 * width**2 + 12 * calibration.batch_size * calibration.tokens * width
        resident = BASE_RAM + MODEL_RAM + max(embedding, work)
        streams = 2 if any(isinstance(s.pass_, LayerPass) and s.pass_.needs_reference for s in plan.steps) else 1
        text = source.config.get("text_config") or source.config
        hidden = streams * calibration.samples * calibration.tokens * text["hidden_size"] * DTYPES[plan.description.sites[0].dtype][0] // 8
        spills = device == "cpu" or max(peak, resident + hidden) > (plan.recipe.runtime.max_ram_bytes or free_ram_bytes())
        peak = max(peak, resident + (0 if spills else hidden))
    if any(step.pass_.kind is Kind.MODEL or (isinstance(step.pass_, RuntimePass) and step.pass_.makes) for step in plan.steps):
        peak = max(peak, BASE_RAM + MODEL_RAM + 4 * plan.bytes_before)
    if source.trained and device == "cpu":
        peak = max(peak, BASE_RAM + MODEL_RAM + plan.training_bytes[0])
    return peak, spills
