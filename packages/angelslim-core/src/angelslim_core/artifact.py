"""What an output folder holds beside its weights: config, tokenizer, card, and the records under `angelslim/`."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .adapters import loaded_names
from .io.writer import write_index, write_json, write_text
from .model import sanitized
from .passes import RuntimePass, WeightPass
from .recipe import to_yaml
from .records import RECORDS
from .transforms import transform_config
from .workdir import sha256

if TYPE_CHECKING:
    from .adapters.base import Layout
    from .context import Context
    from .exporters import Exporter
    from .plan import Plan, Step
    from .plugins import PluginHost
    from .schemes import Scheme
    from .source import Source

_LIBRARIES = ("angelslim-core", "torch", "transformers", "safetensors", "compressed-tensors")


@dataclass
class Artifact:
    """A finished output, as the hook `angelslim_run_finished` sees it.

    Args:
        path: the folder (the stage, until it is published).
        plan: what was planned.
        passes: per step `{id, seconds, metrics}`.
        metrics: per linear `analysis.weight_numbers`.
        policies: `{pass, policy}` of runtime passes.
        context: warnings and fallbacks of the run.
        analysis: what the report draws (`analysis.summarized`).
        digests: SHA-256 of files that are already known, by name.
    """

    path: Path
    plan: Plan
    passes: list[dict[str, Any]]
    metrics: dict[str, Any]
    policies: list[dict[str, Any]]
    context: Context
    analysis: dict[str, Any]
    digests: Mapping[str, str] = field(default_factory=dict)


def fingerprint(plan: Plan, host: PluginHost, context: Context) -> dict[str, Any]:
    """What must be equal for an unfinished run to be resumed.

    Shards count by name, size, time of change and header: hashing a terabyte before the first tensor would double the
    reading, and a changed file changes its time.
    """
    recipe = plan.recipe.model_dump(mode="json", by_alias=True, exclude={"export": {"to"}, "model": True, "eval": True, "gates": True})
    return {
        "source": _shards(plan.source),
        "other sources": [_shards(source) for step in plan.steps if isinstance(step.pass_, WeightPass) for source in step.pass_.sources],
        "files": {f"steps[{s.index}].{name}": _stamp(path) for s in plan.steps for name, path in s.pass_.config if isinstance(path, Path)},
        "config": hashlib.sha256(json.dumps(plan.source.config, sort_keys=True).encode()).hexdigest(),
        "recipe": recipe,
        "schemes": hashlib.sha256(json.dumps({n: s.as_dict() for n, s in plan.schemes.items()}, sort_keys=True).encode()).hexdigest(),
        "calibration tokens": context.samples.fingerprint if context.samples else None,
        "seed": context.seed,
        "versions": versions(),
        "plugins": plugin_records(host),
        "device": context.device,
    }


def _shards(source: Source) -> dict[str, list[Any]]:
    files = sorted({info.file for info in source.checkpoint.tensors.values()})
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns, _header_digest(f)] for f in files}


def _stamp(path: Path) -> dict[str, list[int]]:
    """Size and time of change of a file, or of each in a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _header_digest(file: Path) -> str:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return hashlib.sha256(stream.read(length)).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and the libraries a result depends on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def plugin_records(host: PluginHost) -> list[dict[str, str]]:
    """Loaded plugins with distribution, version and hash of their RECORD."""
    return [{"id": p.id, "dist": p.dist, "version": p.version, "record_sha256": p.record_sha256} for p in host.loaded.values()]


def ledger(plan: Plan) -> dict[str, Any]:
    """What became of every stored source tensor: quantized, transformed, trained, copied, or dropped with the reason; and what was added."""
    fate: dict[str, Any] = {}
    transformed = {i for i, s in enumerate(plan.steps) if s.sites}
    for unit in plan.units:
        for name in (n for n in unit.tensors if n not in plan.source.matrices):
            schemes = sorted({plan.schemes[s.name].name for s in unit.sites if s.tensor == name and s.name in plan.schemes})
            changed = name in plan.source.changed
            if schemes:
                flags = {"transformed": changed, "trained": name in plan.source.trained}
                fate[name] = {"fate": "quantized", "scheme": ", ".join(schemes), **{flag: True for flag, is_set in flags.items() if is_set}}
            elif changed or transformed & set(unit.steps):
                fate.setdefault(name, {"fate": "transformed"})
            elif name in plan.source.added:
                fate[name] = {"fate": "added", "by": plan.source.added[name]}
            elif name in plan.source.trained:
                fate.setdefault(name, {"fate": "trained"})
            else:
                fate.setdefault(name, {"fate": "copied"})
    for stored, logical in plan.source.consumed.items():
        if stored != logical:
            fate[stored] = {"fate": "dropped", "reason": f"folded into {logical}"}
    for stored in plan.source.checkpoint.tensors:
        if reason := plan.source.dropped.get(plan.source.consumed.get(stored, stored)):
            fate[stored] = {"fate": "dropped", "reason": reason}
    missing = plan.source.checkpoint.tensors.keys() - fate.keys()
    assert not missing, f"no fate for {sorted(missing)[0]}"
    return fate


def complete(stage: Path, plan: Plan, host: PluginHost, context: Context, run: Callable[[Step, Callable[[], Any]], Any]) -> dict[int, dict[str, Any]]:
    """Make of the weights in the stage a folder that loads, then let runtime passes make the files of their policies.

    Args:
        run: runs a step, as the pipeline does.

    Returns:
        what the steps report, by their numbers.
    """
    write_index(stage, [{n: s for i in shard for n, s in plan.units[i].outputs.items()} for shard in plan.shards])
    write_json(stage / "config.json", output_config(plan))
    for companion in plan.source.checkpoint.companions:
        shutil.copyfile(companion, stage / companion.name)
    for name, content in (plan.exporter.files(plan.schemes, plan.ignore) if plan.exporter else {}).items():
        write_json(stage / name, content)
    for step in plan.steps:
        if isinstance(step.pass_, RuntimePass):
            step.pass_.leave(stage)
    makers = [(step, step.pass_) for step in plan.steps if isinstance(step.pass_, RuntimePass) and step.pass_.makes]
    if not makers:
        return {}
    from .loading import load_model

    loaded = load_model(stage, context.device, host=host)
    return {step.index: dict(run(step, lambda pass_=pass_: pass_.make(loaded, stage, context))) for step, pass_ in makers}  # type: ignore[misc]


def write_records(artifact: Artifact, host: PluginHost, before: int, after: int, start: float) -> dict[str, Any]:
    """Write records and card into a complete stage; returns the evaluation's numbers, if the recipe asks for one."""
    stage, plan = artifact.path, artifact.plan
    records = stage / RECORDS
    records.mkdir(exist_ok=True)
    write_text(records / "recipe.yaml", to_yaml(plan.recipe))
    write_json(records / "plan.json", plan.as_dict())
    write_json(records / "ledger.json", ledger(plan))
    write_json(records / "runtime.json", {"policies": artifact.policies})
    write_text(records / "analysis.json", json.dumps(artifact.analysis, allow_nan=False) + "\n")
    write_json(
        records / "provenance.json", {"versions": versions(), "plugins": plugin_records(host), "device": artifact.context.device, "seed": artifact.context.seed}
    )
    evaluation: dict[str, Any] = {}
    if plan.recipe.eval is not None:
        from .evaluation import evaluate

        e = plan.recipe.eval
        evaluation = evaluate(stage, plan.source.checkpoint.folder, text=e.text, windows=e.windows, length=e.length, device=artifact.context.device, host=host)
    write_json(
        records / "metrics.json",
        {
            "passes": artifact.passes,
            "bytes_before": before,
            "bytes_after": after,
            "seconds": round(time.perf_counter() - start, 3),
            "linears": {name: {"sqnr_db": numbers["sqnr_db"]} for name, numbers in artifact.metrics.items()},
            "evaluation": evaluation or None,
            "warnings": artifact.context.warnings,
            "fallbacks": artifact.context.fallbacks,
        },
    )
    write_text(stage / "README.md", card(artifact, before, after, evaluation))
    write_checksums(stage, artifact.digests)
    return evaluation


def write_checksums(stage: Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS over all that is in the stage; files whose digest is known are not read again."""
    known = known or {}
    names = sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    write_text(stage / RECORDS / "SHA256SUMS", "".join(f"{known.get(name) or sha256(stage / name)}  {name}\n" for name in names))


def output_config(plan: Plan) -> dict[str, Any]:
    """The source's config with this output's quantization, without what reaches for code or other folders."""
    if plan.exporter is None:
        return sanitized(plan.source.config)
    config = quantized_config(plan.source.config, plan.description.layout, plan.exporter, plan.schemes, plan.ignore)
    if plan.cache:
        config["quantization_config"] = plan.exporter.with_cache(config["quantization_config"], plan.cache)
    config["quantization_config"].update(transform_config(plan.source.transforms))
    return config


def quantized_config(
    config: Mapping[str, Any], layout: Layout, exporter: Exporter, schemes: Mapping[str, Scheme], ignore: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    """A source's config with `quantization_config`, without what reaches for code or other folders."""
    # engines go by the checkpoint's names, transformers by its own: both are given
    renamed = loaded_names(layout, [*schemes, *ignore])
    schemes = {**schemes, **{renamed[name]: scheme for name, scheme in schemes.items() if name in renamed}}
    ignore = list(dict.fromkeys([*ignore, *(renamed[name] for name in ignore if name in renamed)]))
    return {**sanitized(config), "quantization_config": exporter.config(schemes, ignore)}


def card(artifact: Artifact, before: int, after: int, evaluation: Mapping[str, Any]) -> str:
    """README.md of the output: only what was measured, with how."""
    plan = artifact.plan
    name = plan.source.checkpoint.folder.resolve().name
    head = {"library_name": "transformers", "tags": ["angelslim", *sorted({s.pass_.id for s in plan.steps})], "base_model_relation": "quantized"}
    if plan.recipe.model.path and "/" in plan.recipe.model.path and not Path(plan.recipe.model.path).exists():
        head["base_model"] = plan.recipe.model.path
        name = plan.recipe.model.path
    if licence := _licence(plan.source.checkpoint.folder / "README.md"):
        head["license"] = licence
    rows = [f"| weights | {after / 1e6:.1f} MB, {after / before:.3f} of {before / 1e6:.1f} MB |"]
    for step in artifact.passes:
        if "sqnr_db_mean" in step["metrics"]:
            m = step["metrics"]
            rows.append(f"| {step['id']} | {m['linears']} linears, weight SQNR {m['sqnr_db_mean']:.2f} dB on average, {m['sqnr_db_min']:.2f} dB at worst |")
    if evaluation:
        e = evaluation
        spread = f", standard error {e['kl_stderr']:.4f}" if e["kl_stderr"] is not None else ""  # one window has none
        rows.append(f"| KL(base, output) | {e['kl']:.4f} nats per token, {e['tokens']} tokens{spread}, {e['backend']} |")
        rows.append(f"| perplexity | {e['perplexity']:.3f}, base {e['base_perplexity']:.3f} |")
        rows.append(f"| same first choice | {100 * e['top1_agreement']:.2f} % of tokens |")
    else:
        rows.append("| perplexity, KL | not measured |")
    engines = [f"| {engine} | {'yes' if v['ok'] else 'no'} | {v['why']} |" for engine, v in plan.engines.items()]
    notes = [f"- {line}" for line in (*artifact.context.fallbacks, *artifact.context.warnings)]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_plain(name)}, compressed",
        "Made with AngelSlim. Everything below was measured on the files in this folder; `angelslim/` holds the full records.",
        "| what | measured |\n|---|---|\n" + "\n".join(rows),
        "## Engines\n\nFrom the headers, before any engine ran:\n\n| engine | loads it | why |\n|---|---|---|\n" + "\n".join(engines),
        f"## Recipe\n\n```yaml\n{to_yaml(plan.recipe)}```",
    ]
    if notes:
        parts.append("## Fallbacks and warnings\n\n" + "\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _licence(card: Path) -> str | None:
    """The licence that a model card's head names."""
    try:
        head = card.read_bytes()[:65536].decode("utf-8", "replace").split("---", 2)
    except OSError:
        return None
    match = re.search(r"^license:[ ]*([\w.+-]{1,60})[ ]*$", head[1], re.MULTILINE) if len(head) == 3 and not head[0].strip() else None
    return match and match[1]


def _plain(text: str) -> str:
    return "".join(c for c in text if c.isprintable() and c not in "<>`|")
