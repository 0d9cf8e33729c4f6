"""The steps that see the whole model: quantizers are put in, model passes train, and what they leave is the source of the rest.

In the work folder: `rewritten`, the model as source passes read it; `trained`, what training left, and beside it what
`fake_quant.write_trained` keeps. Both folders are whole or not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .analysis import merged_reports, sqnr_db
from .device import release_ram
from .errors import ModelError, PluginError
from .io.checkpoint import TensorSpec
from .io.strict_json import read_json
from .io.writer import ShardWriter, fsync_folder, shard_name, split_shards, write_index, write_json
from .kv_cache import num_heads
from .model import sanitized
from .passes import ModelPass, Pass, SourcePass, TrainedPass
from .plan import Plan, Step, make_plan
from .recipe import Export
from .schemes import CACHE_SCALES
from .source import RewrittenSource, Source, describe_source, open_source
from .trained_source import TrainedSource, changed_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .adapters.base import Description, Site
    from .context import Context
    from .packed_model import Linears
    from .pipeline import Prepared, Timer
    from .plugins import PluginHost
    from .schemes import CacheScheme, Quantized

# what training did, beside the weights it left
_RECORD = "training.json"


def rewritten(source: Source, passes: Sequence[Pass], host: PluginHost, device: str, seed: int) -> tuple[Source, Description]:
    """A source as source passes change it, and its description."""
    description = describe_source(source, host.registry.layouts)
    for pass_ in passes:
        if isinstance(pass_, SourcePass):
            source = pass_.rewrite(source, description, device, seed)
            description = describe_source(source, host.registry.layouts)
    return source, description


def train_model(prepared: Prepared, context: Context, timer: Timer) -> Plan:
    """Run the model passes in every process, unless an earlier run has; the plan of all steps over what they leave."""
    first = next(i for i, p in enumerate(prepared.passes) if isinstance(p, ModelPass))
    base, description = rewritten(prepared.original, prepared.passes[:first], prepared.host, prepared.device, context.seed)
    context.source, context.description = base, description
    folder = context.workdir / "trained"
    if not context.group.share(folder.is_dir()):
        _run(prepared, base, context, timer, folder)
    context.group.share(None)  # the others wait for it
    release_ram()
    if context.group.rank == 0:
        shutil.rmtree(context.workdir / "rewritten", ignore_errors=True)
    record = read_json(folder / _RECORD, 1 << 30)
    for index, report in record["reports"].items():
        timer.reports[int(index)] = report
        timer.seconds[int(index)] = record["seconds"][index]
    for line, kept in ((line, kept) for kept, lines in ((context.warnings, record["warnings"]), (context.fallbacks, record["fallbacks"])) for line in lines):
        kept += [] if line in kept else [line]
    left = open_source(folder, prepared.host.registry.exporters.values())
    trained = TrainedSource(base, description, prepared.plan.source.added, record["settings"], left)
    source, description = rewritten(trained, prepared.passes[first:], prepared.host, prepared.device, context.seed)
    return make_plan(prepared.recipe, prepared.passes, source, description, prepared.host.registry.exporters, prepared.device)


def _run(prepared: Prepared, base: Source, context: Context, timer: Timer, folder: Path) -> None:
    """Train the model, and write what is left of it."""
    import torch

    from .packed_model import Linears

    said = len(context.warnings), len(context.fallbacks)
    model = _loaded(prepared, base, context)
    linears = Linears(model, context.description)
    config = model.config.to_dict()
    steps = [s for s in prepared.plan.steps if isinstance(s.pass_, ModelPass | TrainedPass)]
    with torch.random.fork_rng([torch.cuda.current_device()] if prepared.device == "cuda" else []):
        torch.manual_seed(context.seed)
        for step in steps:
            pass_ = step.pass_
            if isinstance(pass_, TrainedPass):
                _place(pass_, step.sites, linears)
                _place_cache(pass_, linears, context)
            elif isinstance(pass_, ModelPass):
                timer.reports[step.index] = dict(timer.run(step, lambda pass_=pass_: pass_.run(model, context)) or {})  # type: ignore[misc]
    if context.group.rank:
        return
    quantized = _taken_out(steps, linears, prepared.plan.source.added)
    if quantized:
        from .fake_quant import write_trained

        write_trained(context.workdir, quantized)
    for step in steps:
        if isinstance(step.pass_, TrainedPass) and step.pass_.cache:
            timer.reports[step.index] = _cache_taken_out(step.pass_.cache, linears, context)
            timer.seconds.setdefault(step.index, 0.0)
    planned = prepared.plan.source.config
    added = changed_settings(prepared.source.config, planned) if prepared.plan.source.added else {}
    record = {
        "reports": {str(s.index): timer.reports[s.index] for s in steps if s.index in timer.reports},
        "seconds": {str(s.index): timer.seconds[s.index] for s in steps if s.index in timer.reports},
        "settings": {**changed_settings(config, model.config.to_dict()), **added},
        "warnings": context.warnings[said[0] :],
        "fallbacks": context.fallbacks[said[1] :],
    }
    _save(model, folder, prepared.original.checkpoint.companions, record, added)


def _loaded(prepared: Prepared, base: Source, context: Context) -> PreTrainedModel:
    """The model in its stored dtype on this process's device, with the matrices that it multiplies by while it runs."""
    from .loading import load_model, transform_linears
    from .packed_model import Linears

    folder = base.checkpoint.folder
    if isinstance(base, RewrittenSource):
        folder = context.workdir / "rewritten"
        if context.group.rank == 0 and not folder.is_dir():
            write_plain(base, folder, context)
        context.group.share(None)  # the others wait for it
    model = load_model(folder, prepared.device, host=prepared.host, emulate=False).model
    transform_linears(Linears(model, context.description), base)
    return model


def write_plain(source: Source, folder: Path, context: Context) -> None:
    """Write a source's tensors, as they are read, into a folder that transformers loads, but for the matrices of `source.transforms`."""
    made = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    units = [{name: TensorSpec(source.dtypes[name], source.shapes[name])} for name in source.dtypes if name not in source.matrices]
    shards = [{n: s for i in shard for n, s in units[i].items()} for shard in split_shards(units, Export.model_validate({}).max_shard_bytes)]
    done = 0
    for index, specs in enumerate(shards):
        writer = ShardWriter(made / shard_name(index, len(shards)), specs)
        try:
            for name in specs:
                context.check_stop(name)
                writer.write(name, source.read(name))
                done += 1
                context.progress(done, len(units), name)
            writer.finish()
        finally:
            writer.close()
    write_index(made, shards)
    write_json(made / "config.json", sanitized(source.config))
    os.replace(made, folder)
    fsync_folder(folder.parent)


def _place(pass_: TrainedPass, sites: Sequence[Site], linears: Linears) -> None:
    """Let the linears of a step round from now on."""
    import torch
    from torch import nn

    from .fake_quant import place

    units: dict[str, list[Site]] = {}
    for site in sites:
        units.setdefault(site.fused if pass_.joins_fused and site.fused else site.name, []).append(site)
    for members in units.values():
        modules: dict[Site, nn.Linear] = {}
        for site in members:
            linear = linears(site.name)
            if type(linear) is not nn.Linear or tuple(linear.weight.shape) != site.shape:
                raise ModelError(
                    983, site.name, f"is to round while it is trained, and transformers builds a {type(linear).__name__} there", "add it to `ignore`"
                )
            modules[site] = linear
        for site, quantizer in pass_.quantizers({s: m.weight.detach() for s, m in modules.items()}).items():
            with torch.no_grad():
                if quantizer.to(modules[site].weight.device).bias(modules[site].weight) is not None and not pass_.adds_bias:
                    raise PluginError(980, pass_.id, "its quantizers give linears a bias, and it does not say so", "set adds_bias = True")
            place(modules[site], quantizer)


def _place_cache(pass_: TrainedPass, linears: Linears, context: Context) -> None:
    """Let all attentions round their keys and values from now on, if a step says how."""
    if pass_.cache is None:
        return
    from .fake_cache import place_cache

    heads = num_heads(context.source.config)
    for site in linears.description.attentions.values():
        place_cache(linears.parent(site.name), pass_.cache_quantizer(heads))


def _cache_taken_out(cache: CacheScheme, linears: Linears, context: Context) -> dict[str, Any]:
    """Let attentions read keys and values as they are again, and keep what is to be stored; numbers for the report."""
    from .fake_cache import remove_cache, write_trained_cache

    found = {name: remove_cache(linears.parent(site.name)) for name, site in linears.description.attentions.items()}
    write_trained_cache(context.workdir, found, cache, num_heads(context.source.config))
    return merged_reports([{suffix: float(scale.max()) for suffix, scale in zip(CACHE_SCALES, scales, strict=True)} for scales in found.values()])


def _taken_out(steps: Sequence[Step], linears: Linears, biases: Mapping[str, str]) -> dict[str, Quantized]:
    """Make all linears plain again, with the rounded weights; their codes by name, on the CPU."""
    from torch import nn

    from .fake_quant import FakeQuantizedLinear, remove

    found: dict[str, Quantized] = {}
    for step in (s for s in steps if isinstance(s.pass_, TrainedPass)):
        for site in step.sites:
            linear = linears(site.name)
            assert isinstance(linear, FakeQuantizedLinear), f"{site.name}: a model pass has taken its quantizer out"
            before = linear.weight.detach().clone()
            quantized = remove(linear)
            # the stored weight is what the next steps read: its distance from what was trained is known here only
            numbers = {"sqnr_db": sqnr_db(before, quantized), **quantized.numbers}
            found[site.name] = replace(quantized.to("cpu"), numbers=numbers)
    for name in biases:
        linear = linears(name.removesuffix(".bias"))
        assert isinstance(linear, nn.Linear)
        if linear.bias is None:  # one key of the config speaks for all of them
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    return found


def _save(model: PreTrainedModel, folder: Path, companions: Sequence[Path], record: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the model durably, as a folder that is whole or not there."""
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    made = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    for key, value in settings.items():
        setattr(model.config, key, value)
    if model.can_generate():
        model.generation_config = GenerationConfig()  # transformers saves no model with one that it finds fault with
    model.save_pretrained(made)
    for companion in companions:
        shutil.copy(companion, made / companion.name)
    write_json(made / _RECORD, record)
    for path in made.iterdir():
        fsync_folder(path)
    fsync_folder(made)
    os.replace(made, folder)
    fsync_folder(folder.parent)
