"""One stored layout into another, or into GGUF: codes and scales are laid out anew, so weights stay the same to the last bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import quantized_config, versions, write_checksums
from .context import Progress, silent
from .errors import ModelError, NumericError, OutputError, PlanError, UsageError
from .exporters import Exporter
from .exporters.few_levels import MOST, TERNARY, in_quads, occurring
from .gguf.write import TYPES, write_gguf
from .io.checkpoint import TensorSpec, torch_dtype
from .io.hub import resolve
from .io.writer import ShardWriter, disk_errors, fsync_folder, shard_name, spec_bytes, split_shards, write_index, write_json, write_text
from .plan import left_alone
from .plugins import PluginHost
from .recipe import Export
from .records import RECORDS, read_records
from .schemes import Quantized, Scheme
from .source import Source, describe_source, open_any, quantization_config
from .stream import prefetch
from .workdir import Workdir

if TYPE_CHECKING:
    from .adapters.base import Description

# what a folder can hold beside weights that no other layout has a place for
_BESIDE = ("kv_cache_scheme", "transform_config", "sparsity_config")


def convert(
    folder: str | Path, out: str | Path, to: str, kind: str | None = None, *, progress: Progress = silent, host: PluginHost | None = None
) -> dict[str, Any]:
    """Convert a model folder without quantizing again.

    Args:
        folder: a quantized folder; for GGUF also a plain one.
        out: folder to create, or the file for GGUF.
        to: name of a layout, or "gguf".
        kind: GGUF type, one of `gguf.write.TYPES`.

    Returns:
        `path`, `from`, `to`, `linears`, `bytes_before`, `bytes_after`, `warnings`, and for GGUF `tensors` by type and
        `rounded`, the number of tensors that are not the very numbers of the folder.

    Raises:
        PlanError: the layout cannot hold what the folder holds.
        OutputError: the output exists.
    """
    host = host or PluginHost()
    exporters = host.registry.exporters
    if to != "gguf" and to not in exporters:
        raise UsageError(220, "--to", f"no layout {to!r}", f"known: gguf, {', '.join(sorted(exporters))}")
    if kind is not None and (to != "gguf" or kind not in TYPES):
        raise UsageError(221, "--type", f"{kind!r} is no type of {to}", f"with --to gguf: {', '.join(TYPES)}")
    source = open_any(resolve(folder), exporters.values())
    description = describe_source(source, host.registry.layouts)
    _check_beside(source, to != "gguf" and exporters[to].transforms)
    found: dict[str, Any] = {
        "path": str(out),
        "from": source.exporter.name if source.exporter else "plain",
        "to": to,
        "linears": len(source.quantized),
        "bytes_before": source.checkpoint.nbytes,
        "warnings": list(source.checkpoint.warnings),
    }
    if to == "gguf":
        found.update(_to_file(source, description, Path(out), kind or "auto", progress))
        if read_records(source.checkpoint.folder).get("runtime", {}).get("policies"):
            found["warnings"].append("runtime policies of the folder have no place in a GGUF file")
    else:
        found["bytes_after"] = _to_folder(source, description, Path(out), exporters[to](), progress)
    return found


def _check_beside(source: Source, transforms: bool) -> None:
    """Nothing that the folder holds may be dropped; `transforms`: those of linears have a place."""
    config = quantization_config(source.config) or {}
    for key in _BESIDE:
        if config.get(key) and not (transforms and key == "transform_config"):
            raise PlanError(
                237, str(source.checkpoint.folder), f"has a {key}, which conversion would drop", "quantize the original model into the other layout"
            )
    parts: dict[str, set[str]] = {}
    for stored, logical in source.consumed.items():
        module = logical.removesuffix(".weight")
        parts.setdefault(module, set()).add(stored.removeprefix(f"{module}."))
    for module, scheme in source.quantized.items():
        assert source.exporter
        known = source.exporter.layout(_shape(source, module), replace(scheme, weights=replace(scheme.weights, scale_dtype=_scale_dtype(source, module))))
        extra = sorted(parts[module] - known.keys())
        if extra:
            raise PlanError(238, f"{module}.{extra[0]}", "has no meaning that conversion knows", "quantize the original model into the other layout")


def _to_file(source: Source, description: Description, out: Path, kind: str, progress: Progress) -> dict[str, Any]:
    if out.exists():
        raise OutputError(220, str(out), "exists", "choose another OUT")
    if out.suffix != ".gguf":
        raise UsageError(222, "OUT", "must be the name of a file that ends in .gguf")
    unfinished = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        with disk_errors(unfinished, source.checkpoint.nbytes):
            out.parent.mkdir(parents=True, exist_ok=True)
            counts = write_gguf(source, description, unfinished, kind, progress)
            os.link(unfinished, out)  # unlike a rename, this never replaces what has come there meanwhile
            fsync_folder(out.parent)
    except FileExistsError:
        raise OutputError(221, str(out), "exists", "choose another OUT") from None
    finally:
        unfinished.unlink(missing_ok=True)
    rounded = counts.pop("rounded")
    return {"tensors": counts, "rounded": rounded, "bytes_after": out.stat().st_size}


def _to_folder(source: Source, description: Description, out: Path, exporter: Exporter, progress: Progress) -> int:
    """Write the folder; returns the bytes of its tensors."""
    if source.exporter is None:
        hint = f"angelslim run --set export.format={exporter.name} quantizes into this layout"
        raise PlanError(239, str(source.checkpoint.folder), "is not quantized, so there are no codes to convert", hint)
    schemes = _schemes(source, exporter)
    ignore = left_alone(source, description, schemes)
    names = [*source.dtypes, *_matrices(source)]
    units = [_outputs(source, name, schemes, exporter) for name in names]
    config = quantized_config(source.config, description.layout, exporter, schemes, ignore)
    if source.transforms:
        config["quantization_config"]["transform_config"] = (quantization_config(source.config) or {})["transform_config"]
    shards = split_shards(units, Export.model_validate({}).max_shard_bytes)
    total = sum(spec_bytes(spec) for unit in units for spec in unit.values())
    folder = source.checkpoint.folder
    with Workdir(out, folder, replace=False) as workdir, disk_errors(out, total):
        stage = workdir.stage
        done = 0
        for index, members in enumerate(shards):
            writer = ShardWriter(stage / shard_name(index, len(shards)), {n: s for i in members for n, s in units[i].items()})
            try:
                for name, got in prefetch([names[i] for i in members], lambda name: _read(source, name)):
                    for tensor, value in _tensors(name, got, schemes, exporter).items():
                        writer.write(tensor, value)
                    done += 1
                    progress(done, len(names), name)
                writer.finish()
            except BaseException:
                writer.close()
                raise
        write_index(stage, [{n: s for i in members for n, s in units[i].items()} for members in shards])
        write_json(stage / "config.json", config)
        for name, content in exporter.files(schemes, ignore).items():
            write_json(stage / name, content)
        for companion in source.checkpoint.companions:
            shutil.copyfile(companion, stage / companion.name)
        records = stage / RECORDS
        records.mkdir()
        if (folder / RECORDS / "runtime.json").is_file():
            shutil.copyfile(folder / RECORDS / "runtime.json", records / "runtime.json")
        write_json(records / "conversion.json", {"from": source.exporter.name, "to": exporter.name, "versions": versions()})
        write_text(
            stage / "README.md", f"Converted from {source.exporter.name} to {exporter.name} by AngelSlim: the same codes and scales in another layout.\n"
        )
        write_checksums(stage)
        workdir.publish()
    return total


def _schemes(source: Source, exporter: Exporter) -> dict[str, Scheme]:
    """Schemes of all modules as the layout will hold them, the dtype of scales settled.

    Raises:
        PlanError: a scale is no number of the dtype that the layout prescribes.
    """
    modules = list(source.quantized)
    stored = {module: _scale_dtype(source, module) for module in modules}
    chosen = stored
    integer = [m for m in modules if source.quantized[m].weights.type == "int"]
    if integer:
        computed = source.dtypes[f"{integer[0]}.weight"]
        wanted = exporter.scale_dtype or computed  # readers cast scales to the dtype they compute in
        misfit = next((m for m in integer if not _holds(source, m, wanted)), None)
        if misfit is not None and exporter.scale_dtype:
            hint = f"quantize the original model with --set export.format={exporter.name}"
            raise PlanError(233, misfit, f"has a scale that is no {wanted} number", hint)
        if misfit is None:
            chosen = {**stored, **dict.fromkeys(integer, wanted)}
    schemes = {m: replace(s, weights=replace(s.weights, scale_dtype=chosen[m])) for m, s in source.quantized.items()}
    return _with_levels(source, schemes) if exporter.few_levels else schemes


def _with_levels(source: Source, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Schemes that name the codes which occur, where they are few: in all modules of one scheme, or else in each."""
    alike: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        alike.setdefault(scheme, []).append(module)
    chosen: dict[str, Scheme] = {}
    for scheme, modules in alike.items():
        found = {m: _occurring(source, m, scheme) for m in modules}
        few = {level for levels, _ in found.values() for level in levels or range(MOST + 1)}
        for part in [modules] if len(few) <= MOST else [[m] for m in modules]:
            levels = found[part[0]][0] if len(part) == 1 else tuple(sorted(few))
            levels = TERNARY if levels and {*levels} <= {*TERNARY} else levels
            sparsity = (3, 4) if levels == TERNARY and all(found[m][1] for m in part) else None
            chosen |= dict.fromkeys(part, replace(scheme, weights=replace(scheme.weights, levels=levels, sparsity=sparsity)))
    return {module: chosen[module] for module in schemes}


def _occurring(source: Source, module: str, scheme: Scheme) -> tuple[tuple[int, ...] | None, bool]:
    """Levels of a module, None where they are many, and whether its codes are 3:4-sparse."""
    grid = scheme.weights
    if grid.type != "int" or grid.levels:
        return grid.levels, grid.sparsity == (3, 4)
    codes = source.read_quantized(module).codes
    levels = occurring(codes)
    return levels, levels == TERNARY and in_quads(codes)


def _scale_name(source: Source, module: str) -> str:
    assert source.exporter
    return f"{module}.{source.exporter.scale_suffix}"


def _scale_dtype(source: Source, module: str) -> str:
    name = _scale_name(source, module)
    if name not in source.checkpoint.tensors:
        raise ModelError(234, name, "is missing, so there is no scale to convert")
    return source.checkpoint.tensors[name].dtype


def _holds(source: Source, module: str, dtype: str) -> bool:
    scale = source.checkpoint.read(_scale_name(source, module)).float()
    return bool(scale.to(torch_dtype(dtype)).float().equal(scale))


def _shape(source: Source, module: str) -> tuple[int, int]:
    rows, columns = source.shapes[f"{module}.weight"]
    return rows, columns


def _matrices(source: Source) -> list[str]:
    """Stored tensors that are no weights of the model: matrices of transforms."""
    return [name for name in source.checkpoint.tensors if name not in source.dtypes and name not in source.consumed] if source.transforms else []


def _outputs(source: Source, name: str, schemes: Mapping[str, Scheme], exporter: Exporter) -> dict[str, TensorSpec]:
    module = name.removesuffix(".weight")
    if name not in source.dtypes:
        return {name: TensorSpec(source.checkpoint.tensors[name].dtype, source.checkpoint.tensors[name].shape)}
    if module not in schemes:
        return {name: TensorSpec(source.dtypes[name], source.shapes[name])}
    return {f"{module}.{suffix}": spec for suffix, spec in exporter.layout(_shape(source, module), schemes[module]).items()}


def _read(source: Source, name: str) -> Any:
    module = name.removesuffix(".weight")
    if name not in source.dtypes:
        return source.checkpoint.read(name)
    return source.read_quantized(module) if module in source.quantized else source.read(name)


def _tensors(name: str, got: Any, schemes: Mapping[str, Scheme], exporter: Exporter) -> dict[str, Any]:
    """Tensors to write for one logical tensor.

    Raises:
        NumericError: what was packed does not unpack to the same numbers.
    """
    if not isinstance(got, Quantized):
        return {name: got}
    module = name.removesuffix(".weight")
    scheme = schemes[module]
    scale = got.scale.to(torch_dtype(scheme.weights.scale_dtype)) if scheme.weights.type == "int" else got.scale
    packed = exporter.pack(replace(got, scheme=scheme, scale=scale))
    if not exporter.unpack(packed, scheme).dequantize().equal(got.dequantize()):
        raise NumericError(221, module, f"would not be the same weights in {exporter.name}")
    return {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
