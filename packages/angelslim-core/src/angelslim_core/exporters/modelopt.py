"""The layout that NVIDIA's Model Optimizer gives NVFP4, which TensorRT-LLM, vLLM and SGLang read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, PlanError
from ..schemes import Grid, Quantized, Scheme
from . import Exporter, TensorSpec
from .packing import pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    from torch import Tensor

_WHERE = "config.json: quantization_config"
_WEIGHTS = Grid(4, "float", "tensor_group", 16, scale_dtype="F8_E4M3")
_INPUTS = Grid(4, "float", "tensor_group", 16, dynamic="local", scale_dtype="F8_E4M3")
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")


class ModelOpt(Exporter):
    """NVFP4: two E2M1 codes a byte in `weight`, E4M3 `weight_scale` a block of 16, `weight_scale_2` and `input_scale` a tensor."""

    name = "modelopt"
    quant_method = "modelopt"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        (rows, columns), grid, inputs = shape, scheme.weights, scheme.input_activations
        kind = (grid.bits, grid.type, grid.strategy, grid.group_size)
        if kind != (4, "float", "tensor_group", 16) or (inputs and (inputs.bits, inputs.type, inputs.strategy) != (4, "float", "tensor_group")):
            raise PlanError(224, self.name, f"holds NVFP4 weights, not {scheme.name}")
        specs = {
            "weight": TensorSpec("U8", (rows, columns // 2)),
            "weight_scale": TensorSpec("F8_E4M3", grid.scale_shape(shape)),
            "weight_scale_2": TensorSpec("F32", ()),
        }
        if inputs:
            specs["input_scale"] = TensorSpec("F32", ())
        return specs

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        assert quantized.global_scale is not None
        tensors = {
            "weight": pack_nibbles(quantized.codes),
            "weight_scale": quantized.scale,
            "weight_scale_2": quantized.global_scale.reshape(()),
        }
        if quantized.input_scale is not None:
            tensors["input_scale"] = quantized.input_scale.reshape(())
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        packed, scale = tensors["weight"], tensors["weight_scale"]
        rows, columns = packed.shape[0], packed.shape[1] * 2
        if tuple(scale.shape) != (rows, columns // 16) or columns % 16:
            raise ModelError(231, "weight_scale", f"has shape {list(scale.shape)}, which does not fit {rows} x {columns} in blocks of 16")
        inputs = tensors.get("input_scale")
        return Quantized(
            scheme,
            unpack_nibbles(packed),
            scale,
            input_scale=None if inputs is None else inputs.reshape(1),
            global_scale=tensors["weight_scale_2"].float().reshape(1),
        )

    def weight_shape(self, specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        weight = specs.get("weight")
        if weight is None or weight.dtype != "U8" or len(weight.shape) != 2:
            raise ModelError(232, "weight", "is no matrix of bytes, each two codes")
        return weight.shape[0], weight.shape[1] * 2

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        grid = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
        inputs = {"input_activations": grid} if _algorithm(schemes) == "NVFP4" else {}
        return {
            "quant_method": self.quant_method,
            "quant_algo": _algorithm(schemes),
            "group_size": 16,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": grid, **inputs}},
            "ignore": _wildcards(ignore),
            "kv_cache_scheme": None,
        }

    def files(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        quantization = {"quant_algo": _algorithm(schemes), "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": _wildcards(ignore)}
        return {"hf_quant_config.json": {"quantization": quantization}}

    def schemes(self, config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]]) -> dict[str, Scheme]:
        algorithm = str(config.get("quant_algo", "")).upper()
        if algorithm not in _ALGORITHMS:
            raise ModelError(233, _WHERE, f"quant_algo {algorithm[:50]!r} is not known to this reader", f"known: {', '.join(_ALGORITHMS)}")
        found = {}
        for module, suffixes in modules.items():
            if "weight_scale_2" in suffixes:
                found[module] = nvfp4_scheme(algorithm == "NVFP4" and "input_scale" in suffixes)
        return found


def nvfp4_scheme(with_inputs: bool) -> Scheme:
    """E2M1 in blocks of 16 under E4M3 block scales and one fp32 scale; inputs likewise, block scales computed at run time, or in 16 bits."""
    return Scheme("nvfp4" if with_inputs else "nvfp4a16", _WEIGHTS, _INPUTS if with_inputs else None, ("compressed-tensors", "modelopt"))


def _algorithm(schemes: Mapping[str, Scheme]) -> str:
    kinds = {scheme.input_activations is not None for scheme in schemes.values()}
    if len(kinds) != 1:
        raise PlanError(225, "modelopt", "holds NVFP4 with or without quantized inputs in one folder, not both")
    return "NVFP4" if kinds.pop() else "W4A16_NVFP4"


def _wildcards(ignore: Sequence[str]) -> list[str]:
    """Rules as its readers write them: `*` for any text."""
    return [rule.removeprefix("re:").replace(".*", "*") for rule in ignore]
