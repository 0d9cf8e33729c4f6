"""The compressed-tensors layout, which vLLM, SGLang and transformers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import regex

from ..errors import ModelError, PlanError
from ..schemes import CacheScheme, Grid, Quantized, Scheme, Strategy
from . import Exporter, TensorSpec
from .packing import pack, pack_nibbles, packed_columns, unpack, unpack_nibbles

if TYPE_CHECKING:
    from torch import Tensor

_WHERE = "config.json: quantization_config"
_FP4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
# dtypes of scales that are no plain floating-point numbers: of each format, and as its config writes them
_FORMAT_SCALES = {"nvfp4-pack-quantized": "F8_E4M3", "mxfp4-pack-quantized": "U8", "mxfp8-quantized": "U8"}
# an FP8 KV cache, but for what shares a scale
_CACHE = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
_SCALES = {"F8_E4M3": "torch.float8_e4m3fn", "U8": "torch.uint8"}


class CompressedTensors(Exporter):
    """compressed-tensors: `weight` or `weight_packed`, `weight_scale` and, where there are any, zero points.

    Global scales of NVFP4 are stored as their inverse.
    """

    name = "compressed-tensors"
    quant_method = "compressed-tensors"
    transforms = True
    groups = True

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        grid, stored = scheme.weights, storage_format(scheme)
        scale = TensorSpec(grid.scale_dtype, grid.scale_shape(shape))
        specs = {"weight_scale": scale}
        if stored in _FP4:
            specs["weight_packed"] = TensorSpec("U8", (shape[0], shape[1] // 2))
        elif stored == "pack-quantized":
            specs["weight_packed"] = TensorSpec("I32", (shape[0], packed_columns(shape[1], grid.bits)))
            specs["weight_shape"] = TensorSpec("I64", (2,))
            if not grid.symmetric:
                specs["weight_zero_point"] = TensorSpec("I32", (packed_columns(scale.shape[0], grid.bits), scale.shape[1]))
        else:
            specs["weight"] = TensorSpec("F8_E4M3" if grid.type == "float" else "I8", shape)
        if grid.strategy == "tensor_group":
            specs["weight_global_scale"] = TensorSpec("F32", (1,))
        if scheme.input_activations and scheme.input_activations.dynamic is not True:
            specs[_input_scale(scheme.input_activations)] = TensorSpec("F32", (1,))
        return specs

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        import torch

        scheme, codes = quantized.scheme, quantized.codes
        stored, inputs = storage_format(scheme), scheme.input_activations
        tensors = {"weight_scale": quantized.scale}
        if stored in _FP4:
            tensors["weight_packed"] = pack_nibbles(codes)
        elif stored == "pack-quantized":
            tensors["weight_packed"] = pack(codes, scheme.weights.bits)
            tensors["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
            if quantized.zero_point is not None:
                tensors["weight_zero_point"] = pack(quantized.zero_point.T, scheme.weights.bits).T.contiguous()
        else:
            tensors["weight"] = codes
        if quantized.global_scale is not None:
            tensors["weight_global_scale"] = 1 / quantized.global_scale
        if quantized.input_scale is not None:
            assert inputs
            tensors[_input_scale(inputs)] = 1 / quantized.input_scale if inputs.dynamic else quantized.input_scale
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        grid, scale = scheme.weights, tensors["weight_scale"]
        zero_point = None
        if storage_format(scheme) in _FP4:
            codes = unpack_nibbles(tensors["weight_packed"])
            if tuple(scale.shape) != grid.scale_shape((codes.shape[0], codes.shape[1])):
                raise ModelError(262, "weight_scale", f"has shape {list(scale.shape)}, which does not fit codes {list(codes.shape)}")
        elif "weight_packed" in tensors:
            rows, columns = (int(n) for n in tensors["weight_shape"])
            packed = tensors["weight_packed"]
            if tuple(packed.shape) != (rows, packed_columns(columns, grid.bits)):
                raise ModelError(45, "weight_shape", f"says {[rows, columns]}, but {list(packed.shape)} words are packed")
            codes = unpack(packed, grid.bits, columns)
            if "weight_zero_point" in tensors:
                zero_point = unpack(tensors["weight_zero_point"].T, grid.bits, scale.shape[0]).T
        else:
            codes = tensors["weight"]
        inputs = tensors.get("input_scale")
        if inputs is None:
            inputs = _inverse("input_global_scale", tensors)
        return Quantized(scheme, codes, scale, zero_point, inputs, _inverse("weight_global_scale", tensors))

    def weight_shape(self, specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
        if storage_format(scheme) not in _FP4:
            return None
        packed = specs.get("weight_packed")
        if packed is None or packed.dtype != "U8" or len(packed.shape) != 2:
            raise ModelError(263, "weight_packed", "is no matrix of bytes, each two codes")
        return packed.shape[0], packed.shape[1] * 2

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        groups: dict[Scheme, list[str]] = {}
        for module, scheme in schemes.items():
            groups.setdefault(_stored(scheme), []).append(module)
        formats = {storage_format(scheme) for scheme in groups} or {"dense"}
        return {
            "quant_method": self.quant_method,
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "kv_cache_scheme": None,
            "ignore": list(ignore),
            "config_groups": {
                # one scheme may name the class: engines that rename or fuse modules then still find it
                f"group_{i}": _group(scheme, ["Linear"] if len(groups) == 1 else modules)
                for i, (scheme, modules) in enumerate(groups.items())
            },
        }

    def schemes(self, config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]]) -> dict[str, Scheme]:
        groups = config.get("config_groups")
        if not isinstance(groups, dict):
            raise ModelError(46, _WHERE, "has no config_groups")
        if not all(isinstance(group, dict) and isinstance(group.get("targets", []), list) for group in groups.values()):
            raise ModelError(408, _WHERE, "a config group is no object with a list of targets")
        parsed = [(list(map(str, group.get("targets", []))), _parse(group)) for group in groups.values()]
        found = {}
        for module, suffixes in modules.items():
            if "weight_scale" not in suffixes:
                continue
            scheme = next((s for targets, s in parsed if any(_targets(t, module) for t in targets)), None)
            if scheme is None:
                raise ModelError(47, module, "is stored quantized, but no config group targets it")
            found[module] = scheme
        return found

    def cache(self, config: Mapping[str, Any]) -> CacheScheme | None:
        stored = config.get("kv_cache_scheme")
        if stored is None:
            return None
        for scheme in (CacheScheme("tensor"), CacheScheme("attn_head")):
            wanted = {**_CACHE, "strategy": scheme.strategy}
            if isinstance(stored, dict) and all(stored.get(key) in (None, value) for key, value in wanted.items()):
                return scheme
        raise ModelError(351, _WHERE, f"its kv_cache_scheme is not known to this reader: {stored!r:.200}")

    def with_cache(self, config: Mapping[str, Any], scheme: CacheScheme) -> dict[str, Any]:
        return {**config, "kv_cache_scheme": {**_CACHE, "strategy": scheme.strategy}}


def _stored(scheme: Scheme) -> Scheme:
    """What is stored of a scheme: neither which codes occur nor what it is called."""
    grid = scheme.weights
    return replace(scheme, name="", weights=replace(grid, levels=None, sparsity=None), exporters=()) if grid.levels or grid.sparsity else scheme


def storage_format(scheme: Scheme) -> str:
    """Name compressed-tensors gives to the way the codes are stored."""
    grid = scheme.weights
    match (grid.type, grid.bits, grid.strategy, grid.group_size, grid.scale_dtype):
        case ("float", 4, "tensor_group", 16, "F8_E4M3"):
            return "nvfp4-pack-quantized"
        case ("float", 4, "group", 32, "U8"):
            return "mxfp4-pack-quantized"
        case ("float", 8, "group", 32, "U8"):
            return "mxfp8-quantized"
        case ("float", 8, _, _, "F32" | "BF16" | "F16"):
            return "float-quantized"
    if grid.type == "int" and grid.bits == 8 and scheme.input_activations is not None:
        return "int-quantized"
    if grid.type == "int" and grid.bits <= 8:
        return "pack-quantized"
    raise PlanError(1, scheme.name, "has no compressed-tensors layout")


def _input_scale(inputs: Grid) -> str:
    """Suffix of the tensor that holds a calibrated input scale."""
    return "input_global_scale" if inputs.dynamic == "local" else "input_scale"


def _inverse(suffix: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """A scale stored as its inverse.

    Raises:
        ModelError: it is no positive number.
    """
    if suffix not in tensors:
        return None
    stored = tensors[suffix].float().reshape(-1)
    if stored.numel() != 1 or not 0 < float(stored) < float("inf"):
        raise ModelError(264, suffix, f"is no positive number: {stored.tolist()!r:.100}")
    return 1 / stored


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "format": storage_format(scheme),
        "weights": _grid(scheme.weights),
        "input_activations": _grid(scheme.input_activations) if scheme.input_activations else None,
        "output_activations": None,
    }


def _grid(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": grid.type,
        "strategy": grid.strategy,
        "group_size": grid.group_size,
        "block_structure": list(grid.block_structure) if grid.block_structure else None,
        "symmetric": grid.symmetric,
        "dynamic": grid.dynamic,
        "actorder": None,
        **({"scale_dtype": _SCALES[grid.scale_dtype]} if grid.scale_dtype in _SCALES else {}),
    }


def _parse(group: Mapping[str, Any]) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ModelError(48, _WHERE, "a config group has no weights")
    grid, inputs = _parse_grid(weights, str(group.get("format"))), group.get("input_activations")
    alike = isinstance(inputs, dict) and inputs.get("group_size") == grid.group_size
    scheme = Scheme(str(group.get("format", "")), grid, _parse_grid(inputs, str(group.get("format")) if alike else "") if isinstance(inputs, dict) else None)
    if group.get("format") not in (None, storage_format(scheme)):
        raise ModelError(49, _WHERE, f"format {group['format']!r} is not known to this reader")
    return scheme


def _parse_grid(data: Mapping[str, Any], format: str) -> Grid:
    """A grid; `format` tells the dtype of its scales where the grid itself does not."""
    block = data.get("block_structure")
    try:
        grid = Grid(
            bits=int(data["num_bits"]),
            type=data["type"],
            strategy=data.get("strategy") or ("group" if data.get("group_size") else "tensor"),
            group_size=int(data["group_size"]) if data.get("group_size") else None,
            block_structure=(int(block[0]), int(block[1])) if block else None,
            symmetric=bool(data.get("symmetric", True)),
            dynamic=data.get("dynamic", False),
            scale_dtype=next((name for name, written in _SCALES.items() if data.get("scale_dtype") == written), _FORMAT_SCALES.get(format, "F32")),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(50, _WHERE, f"a grid is malformed: {error!r}") from error
    sizes = [grid.bits, grid.group_size or 1, *(grid.block_structure or ())]
    if (
        grid.type not in ("int", "float")
        or grid.dynamic not in (False, True, "local")
        or not 1 <= grid.bits <= 16
        or min(sizes) < 1
        or grid.strategy not in get_args(Strategy)
    ):
        raise ModelError(51, _WHERE, f"a grid is impossible: {dict(data)!r:.200}")
    return grid


def _targets(target: str, module: str) -> bool:
    if target.startswith("re:"):
        try:
            return regex.match(target[3:], module, timeout=1.0) is not None
        except (regex.error, TimeoutError) as error:
            raise ModelError(52, _WHERE, f"{target!r:.200} is no usable regular expression") from error
    return target in ("Linear", module)
