"""Vocabulary of quantization: what a tensor is stored as. Data only; no pass and no layout lives here.

Shapes: O out features, I in features, G groups along `in`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# magnitudes of FP4 E2M1 by index
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# weights treated at a time: by a thread of a CPU, by a GPU
PIECE, GPU_PIECE = 1 << 17, 1 << 25

# suffixes of an attention's scales of keys and of values
CACHE_SCALES = ("k_scale", "v_scale")

Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group"]


@dataclass(frozen=True)
class Grid:
    """The grid a tensor is rounded to.

    Args:
        bits: bits a value.
        type: "int" or "float" (8 bits: E4M3; 4 bits: E2M1).
        strategy: what shares one scale.
        group_size: values along `in` that share a scale, for strategies "group" and "tensor_group".
        block_structure: (rows, columns) that share a scale, for strategy "block".
        symmetric: no zero point.
        dynamic: scales are computed at run time ("local": the inner of two levels is).
        scale_dtype: dtype of the stored scale as safetensors names it ("F32", "BF16", "F16", "F8_E4M3", "U8").
        levels: the codes that occur, ascending, where they are fewer than `bits` allow: an engine's container of 4 bits then
            holds (-1, 0, 1) or (-3, -1, 1, 3), and a layout of our own stores them in fewer bits. None: all of them.
        sparsity: (N, M): in each M neighbours along `in`, just N are not zero.
    """

    bits: int
    type: Literal["int", "float"]
    strategy: Strategy
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False
    scale_dtype: str = "F32"
    levels: tuple[int, ...] | None = None
    sparsity: tuple[int, int] | None = None

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scale of a weight [O, I]."""
        rows, columns = shape
        match self.strategy:
            case "tensor":
                return (1,)
            case "channel":
                return (rows, 1)
            case "group" | "tensor_group":
                assert self.group_size
                return (rows, columns // self.group_size)
            case "block":
                assert self.block_structure
                return (math.ceil(rows / self.block_structure[0]), math.ceil(columns / self.block_structure[1]))
        raise ValueError(f"a weight has no scale of strategy {self.strategy}")


@dataclass(frozen=True)
class Scheme:
    """What a linear layer is stored and run as.

    Args:
        name: short name for tables ("int4 g64 sym").
        weights: grid of the weight.
        input_activations: grid of the input, None for weight-only.
        exporters: names of the layouts that can hold it, preferred first.
    """

    name: str
    weights: Grid
    input_activations: Grid | None = None
    exporters: tuple[str, ...] = ("compressed-tensors",)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CacheScheme:
    """Keys and values kept in the cache as FP8 (E4M3), with fixed fp32 scales.

    Args:
        strategy: what shares a scale of the keys, and one of the values: an attention, or each key-value head of it.
    """

    strategy: Literal["tensor", "attn_head"]

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"fp8 kv cache per {'tensor' if self.strategy == 'tensor' else 'head'}"

    @property
    def exporters(self) -> tuple[str, ...]:
        """Names of the layouts that can hold it, preferred first."""
        return ("compressed-tensors",)

    def shape(self, heads: int) -> tuple[int, ...]:
        """Shape of the scales of the keys, or of the values, of an attention with that many key-value heads."""
        return (1,) if self.strategy == "tensor" else (heads,)


@dataclass
class Quantized:
    """A quantized weight, in no particular layout.

    Args:
        scheme: what it is.
        codes: [O, I]; int8 for integer grids (also below 8 bits), float8_e4m3fn for FP8, uint8 for FP4 (sign << 3 |
            index into `E2M1`).
        scale: shape of `Grid.scale_shape`, dtype as stored (U8: the exponent e of 2^(e - 127), E8M0);
            value = (code - zero_point) * scale, times `global_scale` where there is one.
        zero_point: int8, shape of `scale`, or None when symmetric.
        input_scale: [1] fp32, static activation scale (of strategy "tensor_group": of the block scales), or None.
        global_scale: [1] fp32, multiplies the block scales of strategy "tensor_group", or None.
        numbers: what the pass has to say of this weight in the report, JSON only.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None
    global_scale: Tensor | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The represented weight [O, I], computed in fp32 and rounded to a dtype if one is given."""
        import torch

        cuts = pieces(self.codes, self.scheme.weights)
        if len(cuts) == 1:
            return self._values().to(dtype)
        found = torch.empty(self.codes.shape, dtype=dtype or torch.float32, device=self.codes.device)
        for rows in cuts:
            found[rows] = self.rows(rows)._values()
        return found

    def to(self, device: torch.device | str) -> Quantized:
        """It with its tensors on a device."""
        names = ("codes", "scale", "zero_point", "input_scale", "global_scale")
        return replace(self, **{name: tensor.to(device) for name in names if (tensor := getattr(self, name)) is not None})

    def rows(self, rows: slice) -> Quantized:
        """These rows of it; blocks are not divided (see `pieces`)."""
        grid = self.scheme.weights
        return replace(self, codes=self.codes[rows], scale=scale_rows(self.scale, rows, grid), zero_point=scale_rows(self.zero_point, rows, grid))

    def _values(self) -> Tensor:
        scale = scale_values(self.scale) if self.global_scale is None else scale_values(self.scale) * self.global_scale
        return dequantize(self.codes, scale, self.zero_point, self.scheme.weights)


def pieces(weight_OI: Tensor, grid: Grid) -> list[slice]:
    """Rows to be treated at a time, blocks undivided: on a CPU as many as stay in its cache, fresh memory being slower than
    arithmetic; on a GPU as many as scratch is meant for."""
    import torch

    rows, columns = weight_OI.shape
    size = PIECE * torch.get_num_threads() if weight_OI.device.type == "cpu" else GPU_PIECE
    unit = grid.block_structure[0] if grid.block_structure else 1
    step = max(1, size // max(1, unit * columns)) * unit
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@overload
def scale_rows(scale: Tensor, rows: slice, grid: Grid) -> Tensor: ...
@overload
def scale_rows(scale: None, rows: slice, grid: Grid) -> None: ...
@overload
def scale_rows(scale: Tensor | None, rows: slice, grid: Grid) -> Tensor | None: ...
def scale_rows(scale: Tensor | None, rows: slice, grid: Grid) -> Tensor | None:
    """What of a scale, or of a zero point, belongs to rows of the weight."""
    if scale is None or grid.strategy == "tensor":
        return scale
    unit = grid.block_structure[0] if grid.block_structure else 1
    return scale[rows.start // unit : math.ceil(rows.stop / unit)]


def scale_values(scale: Tensor) -> Tensor:
    """A stored scale in fp32; uint8 is an E8M0 exponent, 2^(e - 127)."""
    import torch

    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    return scale.float()


def code_values(codes: Tensor) -> Tensor:
    """Codes in fp32; uint8 is E2M1, sign << 3 | index."""
    import torch

    fp4, fp8 = codes.dtype == torch.uint8, codes.dtype == torch.float8_e4m3fn
    if codes.is_cuda and fp4:
        return torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)[codes.int()]
    if codes.is_cuda or not (fp4 or fp8):
        return codes.float()
    # on the CPU a table or a cast takes five times as long as this: in F16 both are the same bits with a wider exponent, subnormal ones too
    bits = codes.view(torch.int8).to(torch.int16)
    sign = (bits << 12 if fp4 else bits) & -0x8000
    size = bits.bitwise_and_(7 if fp4 else 0x7F)
    holes = size == 0x7F if fp8 else None
    values = (size << (9 if fp4 else 7)).bitwise_or_(sign).view(torch.float16).float().mul_(2.0**14 if fp4 else 2.0**8)
    return values if holes is None else values.masked_fill_(holes, float("nan"))


def dequantize(codes_OI: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """(code - zero_point) * scale in fp32, scales spread as `grid` says; ragged blocks are cut at the edge."""
    values, scales = against(code_values(codes_OI), scale.float(), grid)
    if zero_point is not None:
        values = values - against(codes_OI, zero_point.float(), grid)[1]
    return (values * scales).reshape(codes_OI.shape)


def against(values_OI: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Views of a weight and its scale that broadcast against each other; only ragged-proof blocks need a copy."""
    match grid.strategy:
        case "tensor":
            return values_OI, scale.reshape(1, 1)
        case "channel":
            return values_OI, scale.reshape(-1, 1)
        case "group" | "tensor_group":
            assert grid.group_size
            return values_OI.unflatten(1, (-1, grid.group_size)), scale[..., None]
        case "block":
            assert grid.block_structure
            (high, wide), (rows, columns) = grid.block_structure, values_OI.shape
            return values_OI, scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    raise ValueError(f"no weight scale has strategy {grid.strategy}")
