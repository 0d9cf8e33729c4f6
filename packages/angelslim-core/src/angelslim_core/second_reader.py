"""A second reader of quantized weights, from stored tensors and config straight to numbers.

It shares no code with the exporters, so that a mistake in one of the two shows where their readings differ. It goes by
the formats as their makers describe them: codes by their bits, scales by the place of each weight.

Shapes: O out features, I in features, G groups along `in`, W words.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import regex

from .errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

# any of these beside a module's codes says that it is quantized
MARKS = frozenset({"weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "qweight", "scales"})
# tensors with one value for a whole linear; linears that run as one matmul must agree on them
SHARED = ("weight_scale", "input_scale", "weight_global_scale", "input_global_scale", "weight_scale_2")
_GROUPED = ("compressed-tensors", "angelslim-packed")  # whose config speaks of modules group by group
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # output column c of eight lies in nibble _AWQ_ORDER[c]


class SecondReader:
    """Reads the linears of a folder.

    Args:
        config: its `quantization_config` (hostile input).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.method = str(config.get("quant_method"))

    @property
    def knows(self) -> bool:
        """Whether this reader knows the layout at all."""
        return self.method in _READERS

    def weight(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [O, I] of a module, fp32.

        Args:
            parts: suffix -> tensor as stored.

        Raises:
            ModelError: config and tensors do not make a weight.
        """
        try:
            return _READERS[self.method](self.group(module), parts)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            what = f"no {error} to read" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            raise ModelError(281, module, f"cannot be read a second time: {what.splitlines()[0]:.200}") from error

    def group(self, module: str) -> Mapping[str, Any]:
        """The part of the config that speaks about a module, with the format that holds for it."""
        if self.method not in _GROUPED:
            return self.config
        groups = self.config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict) and any(_named(str(target), module) for target in group.get("targets") or ()):
                return {"format": self.config.get("format"), **{k: v for k, v in group.items() if v is not None}}
        return {}

    def missing(self, module: str, suffixes: Collection[str]) -> list[str]:
        """Suffixes of the scales that the config asks for and a quantized module does not have."""
        if self.method == "compressed-tensors":
            group = self.group(module)
            wanted = ["weight_scale"]
            inputs = group.get("input_activations")
            if isinstance(inputs, dict) and inputs.get("dynamic") in (False, None, "local"):
                wanted.append("input_global_scale" if inputs.get("dynamic") == "local" else "input_scale")
            if group.get("format") == "nvfp4-pack-quantized":
                wanted.append("weight_global_scale")
        else:
            wanted = {
                "fp8": ["weight_scale_inv"],
                "gptq": ["scales", "qzeros"],
                "awq": ["scales", "qzeros"],
                "angelslim-packed": ["weight_scale"],
                "modelopt": ["weight_scale", "weight_scale_2", *(["input_scale"] if str(self.config.get("quant_algo")).upper() == "NVFP4" else [])],
            }.get(self.method, [])
        return [suffix for suffix in wanted if suffix not in suffixes]

    def ignores(self, module: str) -> bool:
        """Whether the config says that a module stays as it is."""
        rules = [str(rule) for rule in self.config.get("ignore") or self.config.get("modules_to_not_convert") or ()]
        if self.method in _GROUPED:
            return any(_named(rule, module) for rule in rules)
        if self.method == "modelopt":
            return any(fnmatch.fnmatchcase(module, rule) for rule in rules)
        if self.method == "gptq":
            dynamic = self.config.get("dynamic")
            rules = [str(rule)[2:] for rule in dynamic if str(rule).startswith("-:")] if isinstance(dynamic, dict) else []
            return (module.endswith("lm_head") and self.config.get("lm_head") is not True) or any(_named(f"re:{rule}", module) for rule in rules)
        # a name of a module, of what holds it, or a pattern
        return any(rule in module or _named(f"re:{rule}", module) for rule in rules)

    def targets(self, module: str) -> bool:
        """Whether the config asks for a linear to be quantized, if it is not ignored."""
        return self.method != "compressed-tensors" or bool(self.group(module))

    def kv_strategy(self) -> str | None:
        """What shares a scale of keys and of values ("tensor" or "attn_head"), None if the cache is not quantized."""
        scheme = self.config.get("kv_cache_scheme")
        return str(scheme.get("strategy") or "tensor") if isinstance(scheme, dict) else None


def shared_scales(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The scales of a module that are one number, by suffix."""
    return {suffix: float(parts[suffix].float().reshape(())) for suffix in SHARED if suffix in parts and parts[suffix].numel() == 1}


def _named(rule: str, module: str) -> bool:
    if rule.startswith("re:"):
        try:
            return regex.match(rule[3:], module, timeout=1.0) is not None
        except (regex.error, TimeoutError, RecursionError) as error:
            raise ModelError(282, "config.json: quantization_config", f"{rule!r:.200} is no usable regular expression") from error
    return rule in ("Linear", module)


# numbers behind codes ------------------------------------------------------------------------------------------------


def _minifloat(exponent_bits: int, mantissa_bits: int, bias: int, nan: int | None = None) -> list[float]:
    """Value of every code of a sign, exponent and mantissa, subnormals included."""
    found = []
    for code in range(1 << (1 + exponent_bits + mantissa_bits)):
        mantissa, exponent = code & ((1 << mantissa_bits) - 1), (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        value = math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias)
        magnitude = code & ((1 << (exponent_bits + mantissa_bits)) - 1)
        sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
        found.append(math.nan if magnitude == nan else sign * value)
    return found


def _values(codes: Tensor) -> Tensor:
    """Numbers behind stored codes: E4M3, or integers."""
    import torch

    if codes.dtype == torch.float8_e4m3fn:
        return torch.tensor(_minifloat(4, 3, 7, nan=0x7F))[codes.contiguous().view(torch.uint8).long()]
    return codes.float()


def _fp4(packed_OW: Tensor) -> Tensor:
    """E2M1 numbers, two a byte, the even column in the low nibble."""
    import torch

    table = torch.tensor(_minifloat(2, 1, 1))
    values = torch.empty(packed_OW.shape[0], packed_OW.shape[1] * 2)
    values[:, 0::2], values[:, 1::2] = table[(packed_OW % 16).long()], table[(packed_OW // 16).long()]
    return values


def _scale(stored: Tensor) -> Tensor:
    """Numbers behind stored scales: E8M0 in bytes, E4M3, or plain."""
    import torch

    if stored.dtype == torch.uint8:
        return torch.where(stored == 255, math.nan, torch.pow(2.0, stored.double() - 127)).float()
    return _values(stored)


def _unpacked(words_RW: Tensor, bits: int, columns: int) -> Tensor:
    """Unsigned codes [R, columns] from the 32-bit words of each row, taken as one long string of bits, lowest first."""
    import torch

    words = words_RW.long() % (1 << 32)
    words = torch.cat([words, torch.zeros_like(words[:, :1])], 1)
    first = torch.arange(columns) * bits
    word, shift = first // 32, first % 32
    return (words[:, word] >> shift | words[:, word + 1] << (32 - shift)) % (1 << bits)


def _spread(scale: Tensor, shape: tuple[int, int], rows: int, columns: int) -> Tensor:
    """A scale for every weight, where `rows` x `columns` weights share one."""
    import torch

    high, wide = -(-shape[0] // rows), -(-shape[1] // columns)
    return scale.reshape(high, wide)[torch.arange(shape[0])[:, None] // rows, torch.arange(shape[1]) // columns]


# layouts -------------------------------------------------------------------------------------------------------------


def _compressed_tensors(group: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    import torch

    grid, bits = group["weights"], int(group["weights"]["num_bits"])
    zero = parts.get("weight_zero_point")
    if "fp4" in str(group["format"]):
        values = _fp4(parts["weight_packed"])
    elif group["format"] == "pack-quantized":
        rows, columns = parts["weight_shape"].tolist()
        values = _unpacked(parts["weight_packed"], bits, columns).float() - (1 << (bits - 1))
        if zero is not None and zero.dtype == torch.int32:
            zero = _unpacked(zero.T, bits, rows).T.float() - (1 << (bits - 1))
    else:
        values = _values(parts["weight"])
    shape = (values.shape[0], values.shape[1])
    tall, wide = grid.get("block_structure") or (1, 1)
    extent = {"tensor": shape, "channel": (1, shape[1]), "block": (tall, wide)}.get(grid["strategy"], (1, grid.get("group_size")))
    if (index := parts.get("weight_g_idx")) is not None:
        scale = _scale(parts["weight_scale"])[:, index.long()]
    else:
        scale = _spread(_scale(parts["weight_scale"]), shape, *extent)
    if "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"].float()
    return (values if zero is None else values - _spread(zero.float(), shape, *extent)) * scale


def _fp8(config: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    values = _values(parts["weight"])
    return values * _spread(_scale(parts["weight_scale_inv"]), (values.shape[0], values.shape[1]), *config["weight_block_size"])


def _gptq(config: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    import torch

    bits, scales_GO = int(config["bits"]), parts["scales"].float()
    rows, columns = scales_GO.shape[1], parts["qweight"].shape[0] * 32 // bits
    codes_IO = _unpacked(parts["qweight"].T, bits, columns).T
    # the first version stores zero points less one
    zeros_GO = (_unpacked(parts["qzeros"], bits, rows) + (0 if config.get("checkpoint_format") == "gptq_v2" else 1)) % (1 << bits)
    size = config["group_size"] if config["group_size"] > 0 else columns
    group_I = parts["g_idx"].long() if "g_idx" in parts else torch.arange(columns) // size
    return ((codes_IO - zeros_GO[group_I]) * scales_GO[group_I]).T


def _awq(config: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    import torch

    scales_GO = parts["scales"].float()
    rows, columns = scales_GO.shape[1], parts["qweight"].shape[0]
    place = torch.arange(rows) // 8 * 8 + torch.tensor(_AWQ_ORDER)[torch.arange(rows) % 8]
    codes_IO, zeros_GO = (_unpacked(parts[name], 4, rows)[:, place] for name in ("qweight", "qzeros"))
    size = config.get("group_size", config.get("q_group_size"))
    group_I = torch.arange(columns) // (size if size and size > 0 else columns)
    return ((codes_IO - zeros_GO[group_I]) * scales_GO[group_I]).T


def _modelopt(config: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    values = _fp4(parts["weight"])
    return values * _spread(_scale(parts["weight_scale"]), (values.shape[0], values.shape[1]), 1, 16) * parts["weight_scale_2"].float()


def _angelslim_packed(group: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    import torch

    grid, scale, zero = group["weights"], parts["weight_scale"].float(), parts.get("weight_zero_point")
    rows, columns = parts["weight_shape"].tolist()
    place, packed = torch.arange(columns), parts["weight_packed"].long()
    match grid["packing"]:
        case "dense":
            values = _unpacked(packed, grid["num_bits"], columns).float() - (1 << (grid["num_bits"] - 1))
        case "2-bit":
            values = torch.tensor(grid["levels"]).float()[packed[:, place // 4] >> 2 * (place % 4) & 3]
        case "base-3":
            values = torch.tensor(grid["levels"]).float()[packed[:, place // 5] // 3 ** (place % 5) % 3]
        case "3:4":  # the lowest bit of a slot and the next: whether the second and the third that is not zero have another sign than the first
            slot = packed[:, place // 8] >> place // 4 % 2 * 4 & 15
            minus = parts["weight_signs"].long()[:, place // 32] >> place // 4 % 8 & 1
            rank = place % 4 - (slot // 4 < place % 4).long()
            values = torch.where(slot // 4 == place % 4, 0.0, 1.0 - 2.0 * (minus ^ (slot * 2 >> rank & 1)))
        case other:
            raise ValueError(f"packing {other!r}")
    extent = {"tensor": (rows, columns), "channel": (1, columns)}.get(grid["strategy"], (1, grid.get("group_size")))
    return (values if zero is None else values - _spread(zero.float(), (rows, columns), *extent)) * _spread(scale, (rows, columns), *extent)


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "modelopt": _modelopt,
    "angelslim-packed": _angelslim_packed,
}
