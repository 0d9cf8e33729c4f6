"""The GPTQ layout: codes packed along the inputs, scales and zero points a group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..schemes import Quantized, Scheme
from . import Exporter, TensorSpec
from .packing import pack, unpack
from .words import WHERE, check_held, check_parts, read_grid, shifted, single_grid

if TYPE_CHECKING:
    from torch import Tensor

BITS = (4, 8)


class GPTQ(Exporter):
    """GPTQ: `qweight` [in/8, out], `qzeros` [groups, out/8], `scales` [groups, out], `g_idx` [in]; no act-order index.

    Zero points are stored less one (`checkpoint_format` gptq) where they are constant. Where they vary they are stored
    as they are (gptq_v2): less one, a zero point of 0 wraps around, and readers that add one to a whole word carry it
    into the neighbour.
    """

    name = "gptq"
    quant_method = "gptq"
    scale_suffix = "scales"
    scale_dtype = "F16"

    def __init__(self) -> None:
        self._less_one = False  # of the folder that is read

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        per_word = check_held(self.name, BITS, shape, scheme)
        (rows, columns), groups = shape, scheme.weights.scale_shape(shape)[1]
        return {
            "qweight": TensorSpec("I32", (columns // per_word, rows)),
            "qzeros": TensorSpec("I32", (groups, rows // per_word)),
            "scales": TensorSpec("F16", (groups, rows)),
            "g_idx": TensorSpec("I32", (columns,)),
        }

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        import torch

        grid, codes = quantized.scheme.weights, quantized.codes
        zero = torch.zeros_like(quantized.scale, dtype=torch.int8) if quantized.zero_point is None else quantized.zero_point
        return {
            "qweight": pack(codes, grid.bits).T.contiguous(),
            "qzeros": pack(shifted(zero.T, -1 if grid.symmetric else 0, grid.bits), grid.bits),
            "scales": quantized.scale.T.contiguous(),
            "g_idx": _group_index(codes.shape[1], grid.group_size).to(codes.device),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        grid, words = scheme.weights, tensors["qweight"]
        rows, columns = words.shape[1], words.shape[0] * 32 // grid.bits
        check_parts(scheme, (rows, columns), tensors["scales"], tensors.get("qzeros"))
        index = tensors.get("g_idx")
        if index is not None and not index.cpu().equal(_group_index(columns, grid.group_size)):
            raise ModelError(223, "g_idx", "groups inputs out of order (desc_act), which this reader does not know")
        zero = None
        if not grid.symmetric:
            if "qzeros" not in tensors:
                raise ModelError(224, "qzeros", "is missing where the config says sym: false")
            zero = shifted(unpack(tensors["qzeros"], grid.bits, rows).T, int(self._less_one), grid.bits).contiguous()
        return Quantized(scheme, unpack(words.T, grid.bits, columns), tensors["scales"].T.contiguous(), zero)

    def weight_shape(self, specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        shape = specs["qweight"].shape
        if len(shape) != 2 or specs["qweight"].dtype != "I32":
            raise ModelError(225, "qweight", f"is {specs['qweight'].dtype} {list(shape)}, not int32 words in two dimensions")
        return shape[1], shape[0] * 32 // scheme.weights.bits

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        grid = single_grid(self.name, schemes)
        skipped = [rule.removeprefix("re:") if rule.startswith("re:") else f"{re.escape(rule)}$" for rule in ignore if not rule.endswith("lm_head")]
        return {
            "quant_method": self.quant_method,
            "bits": grid.bits,
            "group_size": grid.group_size or -1,
            "desc_act": False,
            "sym": grid.symmetric,
            "true_sequential": True,
            "static_groups": True,
            "lm_head": any(name.endswith("lm_head") for name in schemes),
            "checkpoint_format": "gptq" if grid.symmetric else "gptq_v2",
            **({"dynamic": {f"-:{rule}": {} for rule in skipped}} if skipped else {}),
        }

    def schemes(self, config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]]) -> dict[str, Scheme]:
        version = config.get("checkpoint_format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise ModelError(226, WHERE, f"checkpoint_format {version!r:.50} is not known to this reader")
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(rule.startswith("-:") for rule in dynamic):
            raise ModelError(227, WHERE, "gives some modules a grid of their own (dynamic), which this reader does not know")
        self._less_one = version == "gptq"
        scheme = read_grid(config, BITS, config.get("bits"), config.get("group_size"), config.get("sym", True) is True)
        return dict.fromkeys((m for m, suffixes in modules.items() if "qweight" in suffixes), scheme)


def _group_index(columns: int, group_size: int | None) -> Tensor:
    import torch

    return torch.arange(columns, dtype=torch.int32) // (group_size or columns)
