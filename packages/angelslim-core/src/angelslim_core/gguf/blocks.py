"""Weights as GGUF blocks: codes that fit a block type are laid out anew, never rounded again.

Shapes: O out features, I in features, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..schemes import Grid, Quantized, Scheme
from . import low_bits

if TYPE_CHECKING:
    from torch import Tensor


class Block(NamedTuple):
    """A block type.

    Args:
        number: what ggml calls it in a file.
        size: weights that share a block, and its F16 scale.
        nbytes: bytes of a block.
        low, high: integers that it holds, times the scale.
    """

    number: int
    size: int
    nbytes: int
    low: int = 0
    high: int = 0


# those that "auto" takes codes for first; a negative scale turns the codes -2 to 1 into -1 to 2
BLOCKS = {
    "TQ2_0": Block(35, 256, 66, -1, 1),
    "Q2_0": Block(42, 64, 18, -1, 2),
    "Q4_0": Block(2, 32, 18, -8, 7),
    "Q8_0": Block(8, 32, 34, -128, 127),
    "TQ1_0": Block(34, 256, 54, -1, 1),
    "STQ1_0": Block(43, 256, 42, -1, 1),
    "Q4_1": Block(3, 32, 20),
}
AUTO = ("TQ2_0", "Q2_0", "Q4_0", "Q8_0")
# types that hold few levels only, so that weights must be looked at before one is chosen
FEW = ("TQ2_0", "TQ1_0", "Q2_0", "STQ1_0")
PLAIN = {"F32": (0, 4), "F16": (1, 2), "BF16": (30, 2)}
# of types that the gguf library does not know
_FILE_TYPES = {"Q2_0": 41, "STQ1_0": 42}
_DECODERS = {"Q2_0": low_bits.from_q2_0, "STQ1_0": low_bits.from_stq1_0}


def number(kind: str) -> int:
    """What ggml calls a type in a file."""
    return PLAIN[kind][0] if kind in PLAIN else BLOCKS[kind].number


def file_type(kind: str) -> int:
    """What llama.cpp calls a file most matrices of which have that type."""
    import gguf

    return _FILE_TYPES.get(kind) or int(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"])


def nbytes(kind: str, weights: int) -> int:
    """Bytes of so many weights."""
    return weights * PLAIN[kind][1] if kind in PLAIN else weights // BLOCKS[kind].size * BLOCKS[kind].nbytes


def holding(grid: Grid, columns: int) -> tuple[str, ...]:
    """Types that may hold codes of a grid, as far as it tells; of those in `FEW`, `choose` has to look at the codes."""
    if grid.type != "int" or not grid.symmetric or grid.strategy not in ("group", "channel", "tensor"):
        return ()
    half, group = 1 << (grid.bits - 1), grid.group_size or columns
    found = []
    for kind, block in BLOCKS.items():
        if kind in FEW and grid.levels is None:
            few = grid.bits <= 4
        else:
            few = _within(*((grid.levels[0], grid.levels[-1]) if grid.levels else (-half, half - 1)), kind)
        # where several groups share a block, their scales must be equal, which `choose` looks at
        if few and columns % block.size == 0 and (group % block.size == 0 or (kind in FEW and block.size % group == 0)):
            found.append(kind)
    return tuple(found)


def choose(quantized: Quantized, kinds: Sequence[str]) -> str | None:
    """The first of these types that holds codes and scales as they are: in F16, and one a block."""
    held = holding(quantized.scheme.weights, quantized.codes.shape[1])
    low, high = (int(value) for value in quantized.codes.aminmax())

    def fits(kind: str) -> bool:
        return _within(low, high, kind) and _block_scales(quantized, kind) is not None and (kind != "STQ1_0" or low_bits.is_strided(quantized.codes))

    return next((kind for kind in kinds if kind in held and fits(kind)), None)


def lay_out(quantized: Quantized, kind: str) -> Tensor | None:
    """Codes and scales as the bytes of rows of blocks [O, bytes], or None where the type does not hold a scale.

    Args:
        kind: one that `choose` gave, for `FEW`; else one of `holding`.
    """
    import torch

    size, rows = BLOCKS[kind].size, quantized.codes.shape[0]
    found = _block_scales(quantized, kind)
    if found is None:
        return None
    codes, scale = quantized.codes.reshape(-1, size), found.reshape(-1)
    match kind:
        case "Q4_0":  # the first half of a block in the low nibbles
            values = (codes + 8).view(torch.uint8)
            body = values[:, :16] | values[:, 16:] << 4
        case "Q8_0":
            body = codes.contiguous().view(torch.uint8)
        case "Q2_0" if int(codes.amin()) == -2:
            return low_bits.q2_0(-codes, -scale).reshape(rows, -1)
        case _:
            return getattr(low_bits, kind.lower())(codes, scale).reshape(rows, -1)  # type: ignore[no-any-return]
    return torch.cat([scale[:, None].view(torch.uint8), body], -1).reshape(rows, -1)


def ternary(weight_OI: Tensor, size: int) -> Quantized | None:
    """Codes and scales of weights that are -s, 0 and s only in every block of `size` in a row, for an s that F16 holds; else None."""
    if weight_OI.shape[1] % size:
        return None
    blocks = weight_OI.float().unflatten(1, (-1, size))
    scale = blocks.abs().amax(-1)
    if not bool((scale > 0).any()) or not bool(((blocks == 0) | (blocks.abs() == scale[..., None])).all()) or not scale.half().float().equal(scale):
        return None
    grid = Grid(2, "int", "group", size, levels=(-1, 0, 1), scale_dtype="F16")
    return Quantized(Scheme("ternary", grid), blocks.sign().flatten(1).char(), scale.half())


def encode(weight: Tensor, kind: str) -> Any:
    """A weight as a numpy array of a GGUF type, rounded by the gguf library where the type is coarser."""
    import gguf

    return gguf.quants.quantize(weight.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind])


def decode(data: Any, kind: str) -> Tensor:
    """fp32 weights of a GGUF array."""
    import gguf
    import torch

    if kind in _DECODERS:
        rows = torch.from_numpy(data)
        return _DECODERS[kind](rows.reshape(-1, BLOCKS[kind].nbytes)).reshape(rows.shape[0], -1)
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).copy())


def _within(low: int, high: int, kind: str) -> bool:
    block = BLOCKS[kind]
    return (block.low <= low and high <= block.high) or (kind == "Q2_0" and -high >= block.low and -low <= block.high)


def _block_scales(quantized: Quantized, kind: str) -> Tensor | None:
    """F16 scales [O, B] of the blocks of a type; None where they are no such numbers, or differ within a block."""
    (rows, columns), size = quantized.codes.shape, BLOCKS[kind].size
    scale = quantized.scale.half()
    if not scale.float().equal(quantized.scale.float()):
        return None
    scale_OG = scale.reshape(-1, scale.shape[1] if scale.dim() == 2 else 1).expand(rows, -1)
    blocks, groups = columns // size, scale_OG.shape[1]
    if groups <= blocks:
        return scale_OG.repeat_interleave(blocks // groups, 1).contiguous()
    shared = scale_OG.reshape(rows, blocks, groups // blocks)
    return shared[..., 0].contiguous() if bool((shared == shared[..., :1]).all()) else None
