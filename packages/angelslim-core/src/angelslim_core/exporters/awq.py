"""The AWQ layout (version gemm): codes packed along the outputs, in an order of nibbles of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..schemes import Quantized, Scheme
from . import Exporter, TensorSpec
from .packing import unpack
from .words import WHERE, check_held, check_parts, read_grid, single_grid

if TYPE_CHECKING:
    from torch import Tensor

BITS = (4,)
# nibble k of a word holds output ORDER[k] of its eight
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AWQ(Exporter):
    """AWQ: `qweight` [in, out/8], `qzeros` [groups, out/8], `scales` [groups, out]; symmetric grids get a zero point of 8."""

    name = "awq"
    quant_method = "awq"
    scale_suffix = "scales"
    scale_dtype = "F16"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        per_word = check_held(self.name, BITS, shape, scheme)
        (rows, columns), groups = shape, scheme.weights.scale_shape(shape)[1]
        return {
            "qweight": TensorSpec("I32", (columns, rows // per_word)),
            "qzeros": TensorSpec("I32", (groups, rows // per_word)),
            "scales": TensorSpec("F16", (groups, rows)),
        }

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        import torch

        zero = torch.zeros_like(quantized.scale, dtype=torch.int8) if quantized.zero_point is None else quantized.zero_point
        return {"qweight": _pack(quantized.codes), "qzeros": _pack(zero), "scales": quantized.scale.T.contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        words, scales = tensors["qweight"], tensors["scales"]
        columns, rows = words.shape[0], words.shape[1] * 8
        if "qzeros" not in tensors:
            raise ModelError(228, "qzeros", "is missing where the config says zero_point: true")
        check_parts(scheme, (rows, columns), scales, tensors["qzeros"])
        return Quantized(scheme, _unpack(words).T.contiguous(), scales.T.contiguous(), _unpack(tensors["qzeros"]).T.contiguous())

    def weight_shape(self, specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        shape = specs["qweight"].shape
        if len(shape) != 2 or specs["qweight"].dtype != "I32":
            raise ModelError(229, "qweight", f"is {specs['qweight'].dtype} {list(shape)}, not int32 words in two dimensions")
        return shape[1] * 8, shape[0]

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        grid = single_grid(self.name, schemes)
        return {
            "quant_method": self.quant_method,
            "bits": grid.bits,
            "group_size": grid.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            # its readers take an entry for a part of a name
            "modules_to_not_convert": [rule.removeprefix("re:").replace(".*", "") for rule in ignore],
        }

    def schemes(self, config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]]) -> dict[str, Scheme]:
        if str(config.get("version", "gemm")).lower() != "gemm" or config.get("zero_point", True) is not True:
            what = f"version {config.get('version')!r:.50} with zero_point {config.get('zero_point')!r:.50}"
            raise ModelError(230, WHERE, f"{what} is not known to this reader, only gemm with zero points is")
        bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
        scheme = read_grid(config, BITS, bits, group_size, symmetric=False)
        return dict.fromkeys((m for m, suffixes in modules.items() if "qweight" in suffixes), scheme)


def _pack(codes_OR: Tensor) -> Tensor:
    """[R, O / 8] words; bytes are put together before anything is transposed, which then is an eighth as many values."""
    import torch

    outputs, rows = codes_OR.shape
    eights = (codes_OR.contiguous().view(torch.uint8) + 8).view(outputs // 8, 8, rows)
    data = torch.stack([eights[:, low] | eights[:, high] << 4 for low, high in zip(ORDER[::2], ORDER[1::2], strict=True)], -1)
    return data.view(torch.int32).squeeze(-1).T.contiguous()


def _unpack(words_RW: Tensor) -> Tensor:
    rows, words = words_RW.shape
    inverse = [ORDER.index(k) for k in range(8)]
    return unpack(words_RW, 4, words * 8).reshape(rows, words, 8)[..., inverse].reshape(rows, words * 8)
