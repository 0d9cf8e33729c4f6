"""A layout of our own for weights of few levels: the bits a weight that they really take. docs/layouts.md has it byte by byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, PlanError
from ..io.checkpoint import dtype_name
from ..schemes import Grid, Quantized, Scheme
from . import Exporter, TensorSpec
from .few_levels import (
    MOST,
    TERNARY,
    byte_columns,
    pack_digits,
    pack_quads,
    to_index,
    unpack_digits,
    unpack_quads,
)
from .packing import pack, packed_columns, unpack

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_WHERE = "config.json: quantization_config"
# packing -> base of the digits, digits a byte
DIGITS = {"2-bit": (4, 4), "base-3": (3, 5)}
_SCALES = ("F32", "BF16", "F16")
_STRATEGIES = ("group", "channel", "tensor")


class Packed(Exporter):
    """`weight_packed`, `weight_scale`, `weight_shape` and, where there are any, int8 zero points; of 3:4-sparse codes `weight_signs`.

    Weight-only integers: up to 3 levels at 1.6 bits, 4 levels at 2, 3:4-sparse ternary codes at 1.25, others at the bits of their grid.
    """

    name = "packed"
    quant_method = "angelslim-packed"
    transforms = True
    groups = True
    few_levels = True

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        grid = scheme.weights
        if grid.type != "int" or not 1 <= grid.bits <= 8 or grid.strategy not in _STRATEGIES or scheme.input_activations is not None:
            raise PlanError(990, self.name, f"holds weight-only integers of up to 8 bits, not {scheme.name}", "export.format: compressed-tensors")
        rows, columns = shape
        scale = grid.scale_shape(shape)
        specs = {"weight_scale": TensorSpec(grid.scale_dtype, scale), "weight_shape": TensorSpec("I64", (2,))}
        if not grid.symmetric:
            specs["weight_zero_point"] = TensorSpec("I8", scale)
        kind = packing(grid)
        if kind == "dense":
            specs["weight_packed"] = TensorSpec("I32", (rows, packed_columns(columns, grid.bits)))
        elif kind == "3:4":
            if columns % 4:
                raise PlanError(991, self.name, f"has 3:4-sparse codes in fours, which do not divide {columns} columns")
            specs["weight_packed"] = TensorSpec("U8", (rows, byte_columns(columns // 4, 2)))
            specs["weight_signs"] = TensorSpec("U8", (rows, byte_columns(columns // 4, 8)))
        else:
            specs["weight_packed"] = TensorSpec("U8", (rows, byte_columns(columns, DIGITS[kind][1])))
        return specs

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        import torch

        codes, grid = quantized.codes, quantized.scheme.weights
        kind = packing(grid)
        tensors = {"weight_scale": quantized.scale, "weight_shape": torch.tensor(codes.shape, dtype=torch.int64)}
        if quantized.zero_point is not None:
            tensors["weight_zero_point"] = quantized.zero_point
        if kind == "dense":
            tensors["weight_packed"] = pack(codes, grid.bits)
        elif kind == "3:4":
            slots, signs = pack_quads(codes)
            tensors["weight_packed"], tensors["weight_signs"] = pack_digits(slots, 16, 2), pack_digits(signs, 2, 8)
        else:
            assert grid.levels
            tensors["weight_packed"] = pack_digits(to_index(codes, grid.levels), *DIGITS[kind])
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        grid, kind = scheme.weights, packing(scheme.weights)
        columns = self._columns(tensors, scheme)
        packed = tensors["weight_packed"]
        if kind == "dense":
            codes = unpack(packed, grid.bits, columns)
        elif kind == "3:4":
            slots = unpack_digits(packed, 16, 2, columns // 4)
            codes = unpack_quads(slots, unpack_digits(tensors["weight_signs"], 2, 8, columns // 4))
        else:
            assert grid.levels
            codes = unpack_digits(packed, *DIGITS[kind], columns, grid.levels)
        return Quantized(scheme, codes, tensors["weight_scale"], tensors.get("weight_zero_point"))

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        groups: dict[Grid, list[str]] = {}
        for module, scheme in schemes.items():
            groups.setdefault(scheme.weights, []).append(module)
        return {
            "quant_method": self.quant_method,
            "version": VERSION,
            "ignore": list(ignore),
            "config_groups": {
                f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else modules, "weights": _grid(grid)}
                for i, (grid, modules) in enumerate(groups.items())
            },
        }

    def schemes(self, config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]]) -> dict[str, Scheme]:
        groups = config.get("config_groups")
        if config.get("version") != VERSION or not isinstance(groups, dict):
            raise ModelError(992, _WHERE, f"is of version {config.get('version')!r:.50}, or has no config_groups; this reader knows version {VERSION}")
        parsed: list[tuple[set[str], Scheme]] = []
        for group in groups.values():
            targets, weights = (group.get("targets"), group.get("weights")) if isinstance(group, dict) else (None, None)
            if not isinstance(weights, dict) or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
                raise ModelError(993, _WHERE, "a config group is no object with a list of targets and weights")
            parsed.append((set(targets), _scheme(weights)))
        found = {}
        for module, suffixes in modules.items():
            if self.scale_suffix in suffixes:
                scheme = next((s for targets, s in parsed if targets & {module, "Linear"}), None)
                if scheme is None:
                    raise ModelError(994, module, "is stored quantized, but no config group targets it")
                found[module] = scheme
        return found

    def _columns(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> int:
        """Columns of a weight, to whose shape all tensors (hostile input) must fit."""
        size = tensors.get("weight_shape")
        if size is None or tuple(size.shape) != (2,) or size.is_floating_point() or bool((size <= 0).any()):
            raise ModelError(995, "weight_shape", "does not say how many rows and columns are packed")
        rows, columns = (int(n) for n in size)
        if columns % (scheme.weights.group_size or 1) or (packing(scheme.weights) == "3:4" and columns % 4):
            raise ModelError(996, "weight_shape", f"says {columns} columns, which {scheme.name} does not divide")
        for suffix, spec in self.layout((rows, columns), scheme).items():
            tensor = tensors.get(suffix)
            kind = _kind(tensor)
            if tensor is None or tuple(tensor.shape) != spec.shape or kind not in (_SCALES if suffix == self.scale_suffix else (spec.dtype,)):
                held = "missing" if tensor is None else f"{kind} {list(tensor.shape)}"
                raise ModelError(997, suffix, f"is {held}, where {rows} x {columns} in {scheme.name} has {spec.dtype} {list(spec.shape)}")
        return columns


def packing(grid: Grid) -> str:
    """How codes of a grid are packed: "3:4", "base-3", "2-bit", or "dense": the bits of the grid, in 32-bit words."""
    if grid.levels is None or len(grid.levels) > MOST:
        return "dense"
    if grid.sparsity == (3, 4) and grid.levels == TERNARY:
        return "3:4"
    return "base-3" if len(grid.levels) <= 3 else "2-bit"


def named(grid: Grid) -> str:
    """Short name of a weight-only integer grid."""
    levels = "ternary" if grid.levels == TERNARY else f"{len(grid.levels)} levels" if grid.levels else f"int{grid.bits}"
    words = (levels, f"g{grid.group_size}" if grid.group_size else grid.strategy, f"{grid.sparsity[0]}:{grid.sparsity[1]}" if grid.sparsity else "")
    return " ".join(filter(None, words)) + ("" if grid.symmetric else " asym")


def _kind(tensor: Tensor | None) -> str:
    """dtype as safetensors names it, "" where there is nothing."""
    return "" if tensor is None else dtype_name(tensor.dtype)


def _grid(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "strategy": grid.strategy,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "levels": list(grid.levels) if grid.levels else None,
        "sparsity": list(grid.sparsity) if grid.sparsity else None,
        "packing": packing(grid),
        "scale_dtype": grid.scale_dtype,
    }


def _scheme(data: Mapping[str, Any]) -> Scheme:
    """A scheme from a config (hostile input)."""
    bits, strategy, size = data.get("num_bits"), data.get("strategy"), data.get("group_size")
    levels, sparsity, symmetric, dtype = data.get("levels"), data.get("sparsity"), data.get("symmetric"), data.get("scale_dtype")
    known = (
        _whole(bits, 1, 8)
        and strategy in _STRATEGIES
        and (_whole(size, 1, 1 << 31) if strategy == "group" else size is None)
        and isinstance(symmetric, bool)
        and dtype in _SCALES
        and (sparsity is None or (isinstance(sparsity, list) and len(sparsity) == 2 and all(_whole(n, 1, 256) for n in sparsity)))
        and (levels is None or (isinstance(levels, list) and 0 < len(levels) <= 256 and _ascending(levels, 1 << (bits - 1))))  # type: ignore[operator]
    )
    if not known:
        raise ModelError(998, _WHERE, f"a grid is impossible: {dict(data)!r:.200}")
    assert bits
    found = Grid(bits, "int", strategy, size, symmetric=bool(symmetric), scale_dtype=str(dtype))  # type: ignore[arg-type]
    found = replace(found, levels=tuple(levels) if levels else None, sparsity=(sparsity[0], sparsity[1]) if sparsity else None)
    if data.get("packing") != packing(found):
        raise ModelError(999, _WHERE, f"packs codes as {data.get('packing')!r:.50}, where this reader expects {packing(found)}")
    return Scheme(named(found), found, exporters=("packed", "compressed-tensors"))


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _ascending(levels: Sequence[Any], half: int) -> bool:
    return all(_whole(level, -half, half - 1) for level in levels) and all(a < b for a, b in pairwise(levels))
