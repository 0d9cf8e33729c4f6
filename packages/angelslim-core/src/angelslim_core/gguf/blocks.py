"""Weights as GGUF blocks: codes that fit a block type are laid out anew, never rounded again.

Shapes: O out features, I in features, B blocks of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..schemes import Grid, Quantized

if TYPE_CHECKING:
    from torch import Tensor

# type -> weights that share a block
BLOCKS = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "TQ1_0": 256, "TQ2_0": 256}


def holding(grid: Grid, columns: int) -> tuple[str, ...]:
    """Block types that hold the codes of a grid, smallest first: one F16 scale a block of 32, no zero point."""
    fits = grid.type == "int" and grid.symmetric and grid.strategy in ("group", "channel", "tensor")
    if not fits or columns % 32 or (grid.group_size or 32) % 32:
        return ()
    return ("Q4_0", "Q8_0") if grid.bits <= 4 else ("Q8_0",)


def lay_out(quantized: Quantized, kind: str) -> Tensor | None:
    """Codes and scales as the bytes of rows of blocks [O, bytes], or None where F16 does not hold a scale.

    Args:
        kind: one of `holding`.
    """
    import torch

    codes, (rows, columns) = quantized.codes, quantized.codes.shape
    scale = quantized.scale.half()
    if not scale.float().equal(quantized.scale.float()):
        return None
    scale_OB = scale.reshape(-1, scale.shape[1] if scale.dim() == 2 else 1).expand(rows, -1)
    scale_OB = scale_OB.repeat_interleave(columns // 32 // scale_OB.shape[1], 1)[..., None].contiguous()
    blocks = codes.reshape(rows, columns // 32, 32).contiguous()
    if kind == "Q4_0":  # the first half of a block in the low nibbles
        values = (blocks + 8).view(torch.uint8)
        body = values[..., :16] | values[..., 16:] << 4
    else:
        body = blocks.view(torch.uint8)
    return torch.cat([scale_OB.view(torch.uint8), body], -1).reshape(rows, -1)


def is_ternary(weight_OI: Tensor) -> bool:
    """Whether every block of 256 in a row holds -s, 0 and s only, for an s that F16 holds."""
    if weight_OI.shape[1] % 256:
        return False
    blocks = weight_OI.float().reshape(-1, 256).abs()
    scale = blocks.amax(-1, keepdim=True)
    return bool(((blocks == 0) | (blocks == scale)).all()) and scale.half().float().equal(scale) and bool((scale > 0).any())


def encode(weight: Tensor, kind: str) -> Any:
    """A weight as a numpy array of a GGUF type, rounded by the gguf library where the type is coarser."""
    import gguf

    return gguf.quants.quantize(weight.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind])


def decode(data: Any, kind: str) -> Tensor:
    """fp32 weights of a GGUF array."""
    import gguf
    import torch

    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).copy())
