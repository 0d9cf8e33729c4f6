"""The block-FP8 layout DeepSeek published, which transformers calls `fp8`: E4M3 codes and `weight_scale_inv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, PlanError
from ..schemes import Grid, Quantized, Scheme
from . import Exporter, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_WHERE = "config.json: quantization_config"


class HFFP8(Exporter):
    """Block FP8: `weight` in E4M3 and `weight_scale_inv`, which multiplies in spite of its name."""

    name = "fp8"
    quant_method = "fp8"
    scale_suffix = "weight_scale_inv"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        grid, wanted = scheme.weights, block_scheme(scheme.weights.block_structure or (1, 1))
        if replace(grid, scale_dtype=wanted.weights.scale_dtype) != wanted.weights or scheme.input_activations != wanted.input_activations:
            raise PlanError(229, "fp8", f"holds weights in FP8 blocks with dynamic inputs in groups as wide, not {scheme.name}")
        return {"weight": TensorSpec("F8_E4M3", shape), "weight_scale_inv": TensorSpec(grid.scale_dtype, grid.scale_shape(shape))}

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        return {"weight": quantized.codes, "weight_scale_inv": quantized.scale}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        return Quantized(scheme, tensors["weight"], tensors["weight_scale_inv"])

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        blocks = {scheme.weights.block_structure for scheme in schemes.values()}
        if len(blocks) != 1:
            raise PlanError(2, "fp8", f"one layout holds one block size, not {sorted(map(str, blocks))}")
        (block,) = blocks
        assert block
        return {
            "quant_method": self.quant_method,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
            # its readers take an entry for a name and for a pattern
            "modules_to_not_convert": [rule.removeprefix("re:") for rule in ignore],
        }

    def schemes(self, config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]]) -> dict[str, Scheme]:
        block = config.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
            raise ModelError(54, _WHERE, f"weight_block_size is {block!r:.100}, not two positive numbers")
        if config.get("activation_scheme", "dynamic") != "dynamic":
            raise ModelError(460, _WHERE, f"activation_scheme is {config['activation_scheme']!r:.100}; with blocks only dynamic inputs are known")
        scheme = block_scheme((block[0], block[1]))
        return dict.fromkeys((m for m, suffixes in modules.items() if "weight_scale_inv" in suffixes), scheme)

    def weight_shape(self, specs: Mapping[str, TensorSpec], scheme: Scheme) -> None:
        """None, as the shape is that of `weight`; what does not fit the blocks is refused from the headers.

        Raises:
            ModelError: a weight is no FP8 matrix, or a scale is none of its blocks.
        """
        weight, scale = specs["weight"], specs["weight_scale_inv"]
        if weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
            raise ModelError(461, "weight", f"has FP8 scales, but is {weight.dtype} {list(weight.shape)} and no matrix of F8_E4M3")
        if scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
            raise ModelError(462, "weight_scale_inv", f"is {scale.dtype}, which is no dtype of scales")
        wanted = scheme.weights.scale_shape((weight.shape[0], weight.shape[1]))
        if scale.shape != wanted:
            raise ModelError(53, "weight_scale_inv", f"has shape {list(scale.shape)} where blocks need {list(wanted)}")


def block_scheme(block: tuple[int, int]) -> Scheme:
    """W8A8 FP8: weights in blocks of rows x columns, activations in dynamic groups as wide as a block."""
    return Scheme(
        f"fp8 block {block[0]}x{block[1]}",
        Grid(8, "float", "block", block_structure=block),
        Grid(8, "float", "group", group_size=block[1], dynamic=True),
        exporters=("fp8", "compressed-tensors"),
    )
