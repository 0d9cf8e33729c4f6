"""A checkpoint as every pass sees it: plain floating-point tensors, whatever the folder stores.

A quantized folder is dequantized tensor by tensor as it is read, through the exporter that knows its layout. For a run
only block FP8 is accepted (models are published in it); `open_any` also serves `eval`, `load` and `validate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import find_layout, spelled_out
from .adapters.base import Description, Layout, Part, describe
from .errors import ModelError
from .exporters import Exporter, builtin_exporters
from .io.checkpoint import Checkpoint, TensorInfo, TensorSpec, torch_dtype
from .io.writer import spec_bytes
from .records import plugins_hint
from .schemes import CACHE_SCALES, CacheScheme, Quantized, Scheme
from .transforms import Transform, read_transforms

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# exporters whose checkpoints are also published as sources
SOURCES = ("fp8",)
# suffixes of the tensors that hold a weight's codes
CODES = ("weight", "weight_packed", "qweight")


@dataclass
class Source:
    """Logical tensors over a checkpoint.

    Args:
        checkpoint: the folder.
        dtypes: logical tensor name -> dtype as safetensors names it.
        shapes: logical tensor name -> shape.
        quantized: module -> scheme, for modules stored quantized.
        consumed: stored tensor -> logical tensor it was folded into.
        cache: how the KV cache is to be kept; its scales are no logical tensors.
        transforms: what linears multiply their inputs or outputs by when the model runs.
    """

    checkpoint: Checkpoint
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    quantized: dict[str, Scheme]
    consumed: dict[str, str]
    exporter: Exporter | None = None
    cache: CacheScheme | None = None
    transforms: tuple[Transform, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        return spelled_out(self.checkpoint.config)

    @property
    def is_tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return bool(self.config.get("tie_word_embeddings", (self.config.get("text_config") or {}).get("tie_word_embeddings", False)))

    @property
    def warnings(self) -> list[str]:
        """One line each, for the plan."""
        return self.checkpoint.warnings

    @property
    def changed(self) -> frozenset[str]:
        """Logical tensors that are not as the checkpoint has them."""
        return frozenset()

    @property
    def trained(self) -> frozenset[str]:
        """Logical tensors that training may have changed."""
        return frozenset()

    @property
    def added(self) -> dict[str, str]:
        """Logical tensors that training adds -> id of the pass that asked for them."""
        return {}

    @property
    def dropped(self) -> dict[str, str]:
        """Logical tensors of the checkpoint that are left out -> why."""
        return {}

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        """Id of a pass that changes this source -> its numbers, `tensors` among them."""
        return {}

    @property
    def matrices(self) -> frozenset[str]:
        """Tensors that hold matrices of `transforms`: no weights of the model."""
        return frozenset(t.tensor for t in self.transforms if t.tensor)

    def scratch(self, name: str) -> int:
        """Bytes that `read` needs for a moment beyond the tensor it returns."""
        return 0

    def nbytes(self, name: str) -> int:
        """Bytes of a logical tensor."""
        return spec_bytes(TensorSpec(self.dtypes[name], self.shapes[name]))

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """A logical tensor on the CPU; `part` cuts one linear [out, in] out of a stacked tensor."""
        if name.removesuffix(".weight") in self.quantized:
            return self.read_near(name)
        if part is None:
            return self.checkpoint.read(name)
        stacked = self.checkpoint.read(name, (part.expert, part.expert + 1))[0]
        return (stacked.T if part.transposed else stacked)[part.start : part.stop].contiguous()

    def read_near(self, name: str, part: Part | None = None, device: torch.device | None = None) -> Tensor:
        """`read`, but what is stored quantized is dequantized on a device and stays there."""
        module = name.removesuffix(".weight")
        if module not in self.quantized:
            return self.read(name, part)
        return self.read_quantized(module, device).dequantize(torch_dtype(self.dtypes[name]))

    def read_quantized(self, module: str, device: torch.device | None = None) -> Quantized:
        """Codes and scales of a module that is stored quantized, on the CPU if no device is given."""
        assert self.exporter
        tensors = {n.removeprefix(f"{module}."): self.checkpoint.read(n).to(device, non_blocking=True) for n in self._parts[module]}
        return self.exporter.unpack(tensors, self.quantized[module])

    def cache_scales(self, attention: str, heads: int) -> tuple[Tensor, Tensor]:
        """Scales of the keys and of the values that an attention module caches, fp32, [1] or [heads].

        Raises:
            ModelError: one is missing, not positive, or of another number.
        """
        import torch

        assert self.cache
        found = []
        for name in (f"{attention}.{suffix}" for suffix in CACHE_SCALES):
            if name not in self.checkpoint.tensors:
                raise ModelError(352, name, "is missing, and the config asks for a quantized KV cache")
            scale = self.checkpoint.read(name).float().flatten()
            if tuple(scale.shape) != self.cache.shape(heads) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ModelError(353, name, f"does not hold {self.cache.shape(heads)[0]} positive scales, as the config asks")
            found.append(scale)
        return found[0], found[1]

    def __post_init__(self) -> None:
        self._parts: dict[str, list[str]] = {}
        for stored, logical in self.consumed.items():
            self._parts.setdefault(logical.removesuffix(".weight"), []).append(stored)


class RewrittenSource(Source):
    """A source as a pass changes it, tensor by tensor as it is read; subclasses say how in `rewrite`.

    Args:
        inner: the source that is changed.
        pass_id: the pass.
        changed: tensors that `rewrite` changes.
        added: tensors the inner source lacks -> those of its own they are made from.
        dropped: tensors left out -> why.
        config: config.json of the changed model.
        report: numbers for the records.
        warnings: one line each.
        transforms: what linears then multiply their inputs by when the model runs.
    """

    def __init__(
        self, inner: Source, pass_id: str, changed: frozenset[str], *, added: Mapping[str, str], dropped: Mapping[str, str],
        config: dict[str, Any], report: Mapping[str, Any], warnings: Iterable[str] = (), transforms: tuple[Transform, ...] = (),
    ) -> None:  # fmt: skip
        names = {**{n: n for n in inner.dtypes if n not in dropped}, **added}
        super().__init__(inner.checkpoint, {n: inner.dtypes[o] for n, o in names.items()}, {n: inner.shapes[o] for n, o in names.items()}, {}, inner.consumed)
        self.inner, self.transforms = inner, (*inner.transforms, *transforms)
        self._matrices = {t.tensor: t for t in transforms if t.tensor}
        for name, transform in self._matrices.items():
            assert transform.size
            self.dtypes[name], self.shapes[name] = _compute_dtype(config), (transform.size, transform.size)
        self._names, self._own, self._config = names, changed, config
        self._changed = inner.changed | changed
        self._dropped = {**inner.dropped, **dropped}
        self._reports = {**inner.reports, pass_id: {"tensors": len(changed), **report}}
        self._warnings = [*inner.warnings, *warnings]

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def warnings(self) -> list[str]:
        return self._warnings

    @property
    def changed(self) -> frozenset[str]:
        return self._changed

    @property
    def trained(self) -> frozenset[str]:
        return self.inner.trained

    @property
    def added(self) -> dict[str, str]:
        return self.inner.added

    @property
    def dropped(self) -> dict[str, str]:
        return self._dropped

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        return self._reports

    def read(self, name: str, part: Part | None = None) -> Tensor:
        if name in self._matrices:
            return self._matrices[name].matrix().to(torch_dtype(self.dtypes[name]))
        tensor = self.inner.read(self._names[name], part)
        return self.rewrite(name, tensor) if name in self._own else tensor

    def rewrite(self, name: str, tensor: Tensor) -> Tensor:
        """The changed form of a tensor, or of one linear cut out of a stacked tensor: same shape, dtype and place."""
        raise NotImplementedError


def open_source(folder: Path | str, exporters: Iterable[type[Exporter]] | None = None) -> Source:
    """A folder as the source of a run.

    Raises:
        ModelError: the folder is invalid, or already quantized in a layout that is no source.
    """
    source = open_any(folder, exporters)
    if source.exporter and source.exporter.name not in SOURCES:
        method = source.exporter.quant_method
        raise ModelError(55, str(folder), f"is already quantized ({method})", "start from the original model; only block-FP8 checkpoints are also sources")
    bare = next((name for name, dtype in source.dtypes.items() if dtype.startswith("F8_")), None) if source.exporter else None
    if bare:
        raise ModelError(463, bare, "is stored in FP8, but has no scale beside it", "fetch the model again; experts stacked in one tensor are not read as FP8")
    return source


def open_any(folder: Path | str, exporters: Iterable[type[Exporter]] | None = None) -> Source:
    """Any folder a known exporter can read; see `open_source`."""
    checkpoint = Checkpoint.open(folder)
    config = quantization_config(checkpoint.config)
    infos = checkpoint.tensors
    if config is None:
        stray = next((n for n in infos if n.endswith((".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight"))), None)
        if stray:
            raise ModelError(56, stray, "looks quantized, but config.json has no quantization_config")
        return Source(checkpoint, {n: i.dtype for n, i in infos.items()}, {n: i.shape for n, i in infos.items()}, {}, {})
    method = config.get("quant_method")
    known = {e.quant_method: e for e in (builtin_exporters() if exporters is None else exporters)}
    if not isinstance(method, str) or method not in known:
        hint = plugins_hint(checkpoint.folder, f"known here: {', '.join(sorted(known))}")
        raise ModelError(57, str(folder), f"is quantized with {method!r:.100}, which no loaded exporter reads", hint)
    exporter = known[method]()
    modules: dict[str, tuple[str, ...]] = {}
    for name in infos:
        module, _, suffix = name.rpartition(".")
        modules[module] = (*modules.get(module, ()), suffix)
    if config.get("transform_config") and not exporter.transforms:
        raise ModelError(379, str(folder), f"has a transform_config, which is not known of {method}")
    transforms, matrices = read_transforms(config, checkpoint)
    source = _logical(checkpoint, exporter, exporter.schemes(config, modules), exporter.cache(config), modules)
    source.transforms = transforms
    for name in matrices:
        source.dtypes.pop(name), source.shapes.pop(name)
    return source


def describe_source(source: Source, layouts: Iterable[Layout]) -> Description:
    """Match a source against the known architectures."""
    layout = find_layout(source.config, layouts, plugins_hint(source.checkpoint.folder))
    return describe(layout, source.config, {n: s for n, s in source.shapes.items() if n not in source.matrices}, source.dtypes)


def compute_dtype(source: Source, description: Description) -> str:
    """Dtype in which the model computes: that of its first linear; routers, which may be wider, do not count."""
    return next(s.dtype for s in description.sites if s.layer is not None and s.role != "other")


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of a model, also where a multimodal config nests it."""
    for holder in (config, config.get("text_config") or {}):
        if isinstance(holder, Mapping) and holder.get("quantization_config") is not None:
            found = holder["quantization_config"]
            if not isinstance(found, dict):
                raise ModelError(58, "config.json", "quantization_config is no object")
            for key in ("ignore", "modules_to_not_convert"):
                rules = found.get(key)
                if rules is not None and not (isinstance(rules, list) and all(isinstance(rule, str) for rule in rules)):
                    raise ModelError(407, "config.json", f"quantization_config: {key} is no list of names")
            return found
    return None


def _logical(
    checkpoint: Checkpoint, exporter: Exporter, schemes: dict[str, Scheme], cache: CacheScheme | None, modules: Mapping[str, tuple[str, ...]]
) -> Source:  # fmt: skip
    infos = checkpoint.tensors
    dtype = _compute_dtype(checkpoint.config)
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    consumed: dict[str, str] = {}
    for name, info in infos.items():
        module, _, suffix = name.rpartition(".")
        if cache and module not in schemes and suffix in CACHE_SCALES:
            continue
        if module not in schemes or suffix == "bias":
            dtypes[name], shapes[name] = info.dtype, info.shape
            continue
        consumed[name] = f"{module}.weight"
        if suffix in CODES:
            dtypes[f"{module}.weight"] = dtype
            specs = {s: TensorSpec(i.dtype, i.shape) for s in modules[module] if (i := infos[f"{module}.{s}"])}
            try:
                found = exporter.weight_shape(specs, schemes[module])
            except ModelError as error:
                raise ModelError(error.number, f"{module}.{error.where}", error.what, error.hint) from error
            shapes[f"{module}.weight"] = found or (info.shape if suffix == "weight" else _packed_shape(checkpoint, info, module))
    for module in schemes:
        if f"{module}.weight" not in shapes:
            raise ModelError(59, module, f"has scales but no weight (only {', '.join(modules[module])})")
    return Source(checkpoint, dtypes, shapes, schemes, consumed, exporter, cache)


def _packed_shape(checkpoint: Checkpoint, info: TensorInfo, module: str) -> tuple[int, ...]:
    shape = f"{module}.weight_shape"
    if shape not in checkpoint.tensors or checkpoint.tensors[shape].shape != (2,) or checkpoint.tensors[shape].dtype not in ("I64", "I32"):
        raise ModelError(80, module, "is packed, but has no weight_shape")
    rows, columns = (int(n) for n in checkpoint.read(shape))
    if len(info.shape) != 2 or rows != info.shape[0] or not 0 < columns <= info.shape[1] * 32:
        raise ModelError(81, shape, f"says {[rows, columns]}, which {list(info.shape)} words cannot hold")
    return (rows, columns)


def _compute_dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config") or {}
    name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "bfloat16"
    return {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(str(name), "BF16")
