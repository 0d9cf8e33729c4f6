"""The compressed-tensors layout, which vLLM, SGLang and transformers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import regex

from ..errors import ModelError, PlanError
from ..schemes import Grid, Quantized, Scheme, Strategy
from . import Exporter, TensorSpec
from .packing import pack, packed_columns, unpack

if TYPE_CHECKING:
    from torch import Tensor

_WHERE = "config.json: quantization_config"


class CompressedTensors(Exporter):
    """compressed-tensors: `weight` or `weight_packed`, `weight_scale` and, where there are any, zero points."""

    name = "compressed-tensors"
    quant_method = "compressed-tensors"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        grid = scheme.weights
        scale = TensorSpec(grid.scale_dtype, grid.scale_shape(shape))
        specs = {"weight_scale": scale}
        if storage_format(scheme) == "pack-quantized":
            specs["weight_packed"] = TensorSpec("I32", (shape[0], packed_columns(shape[1], grid.bits)))
            specs["weight_shape"] = TensorSpec("I64", (2,))
            if not grid.symmetric:
                specs["weight_zero_point"] = TensorSpec("I32", (packed_columns(scale.shape[0], grid.bits), scale.shape[1]))
        else:
            specs["weight"] = TensorSpec("F8_E4M3" if grid.type == "float" else "I8", shape)
        if scheme.input_activations and scheme.input_activations.dynamic is False:
            specs["input_scale"] = TensorSpec("F32", (1,))
        return specs

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        import torch

        scheme, codes = quantized.scheme, quantized.codes
        tensors = {"weight_scale": quantized.scale}
        if storage_format(scheme) == "pack-quantized":
            tensors["weight_packed"] = pack(codes, scheme.weights.bits)
            tensors["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
            if quantized.zero_point is not None:
                tensors["weight_zero_point"] = pack(quantized.zero_point.T, scheme.weights.bits).T.contiguous()
        else:
            tensors["weight"] = codes
        if quantized.input_scale is not None:
            tensors["input_scale"] = quantized.input_scale
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        grid, scale = scheme.weights, tensors["weight_scale"]
        zero_point = None
        if "weight_packed" in tensors:
            rows, columns = (int(n) for n in tensors["weight_shape"])
            packed = tensors["weight_packed"]
            if tuple(packed.shape) != (rows, packed_columns(columns, grid.bits)):
                raise ModelError(45, "weight_shape", f"says {[rows, columns]}, but {list(packed.shape)} words are packed")
            codes = unpack(packed, grid.bits, columns)
            if "weight_zero_point" in tensors:
                zero_point = unpack(tensors["weight_zero_point"].T, grid.bits, scale.shape[0]).T
        else:
            codes = tensors["weight"]
        return Quantized(scheme, codes, scale, zero_point, tensors.get("input_scale"))

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        groups: dict[Scheme, list[str]] = {}
        for module, scheme in schemes.items():
            groups.setdefault(scheme, []).append(module)
        formats = {storage_format(scheme) for scheme in groups}
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
        parsed = [(list(map(str, group.get("targets", []))), _parse(group)) for group in groups.values() if isinstance(group, dict)]
        found = {}
        for module, suffixes in modules.items():
            if "weight_scale" not in suffixes:
                continue
            scheme = next((s for targets, s in parsed if any(_targets(t, module) for t in targets)), None)
            if scheme is None:
                raise ModelError(47, module, "is stored quantized, but no config group targets it")
            found[module] = scheme
        return found


def storage_format(scheme: Scheme) -> str:
    """Name compressed-tensors gives to the way the codes are stored."""
    grid = scheme.weights
    if grid.type == "float" and grid.bits == 8:
        return "float-quantized"
    if grid.type == "int" and grid.bits == 8 and scheme.input_activations is not None:
        return "int-quantized"
    if grid.type == "int" and grid.bits <= 8:
        return "pack-quantized"
    raise PlanError(1, scheme.name, "has no compressed-tensors layout")


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
    }


def _parse(group: Mapping[str, Any]) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ModelError(48, _WHERE, "a config group has no weights")
    inputs = group.get("input_activations")
    scheme = Scheme(str(group.get("format", "")), _parse_grid(weights), _parse_grid(inputs) if isinstance(inputs, dict) else None)
    if group.get("format") not in (None, storage_format(scheme)):
        raise ModelError(49, _WHERE, f"format {group['format']!r} is not known to this reader")
    return scheme


def _parse_grid(data: Mapping[str, Any]) -> Grid:
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
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(50, _WHERE, f"a grid is malformed: {error!r}") from error
    sizes = [grid.bits, grid.group_size or 1, *(grid.block_structure or ())]
    if grid.type not in ("int", "float") or not 1 <= grid.bits <= 16 or min(sizes) < 1 or grid.strategy not in get_args(Strategy):
        raise ModelError(51, _WHERE, f"a grid is impossible: {dict(data)!r:.200}")
    return grid


def _targets(target: str, module: str) -> bool:
    if target.startswith("re:"):
        try:
            return regex.match(target[3:], module, timeout=1.0) is not None
        except (regex.error, TimeoutError) as error:
            raise ModelError(52, _WHERE, f"{target!r:.200} is no usable regular expression") from error
    return target in ("Linear", module)
