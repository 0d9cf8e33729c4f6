"""Largest magnitudes of a weight, per whatever shares a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.schemes import Grid


def grouped(weight_OI: Tensor, grid: Grid) -> Tensor:
    """The weight as [..., values that share a scale]; strategies "tensor", "channel" and "group"."""
    if grid.strategy == "tensor":
        return weight_OI.reshape(1, -1)
    if grid.strategy == "channel":
        return weight_OI[:, None]
    assert grid.group_size
    return weight_OI.unflatten(1, (-1, grid.group_size))


def amax_of(weight_OI: Tensor, grid: Grid) -> Tensor:
    """fp32 absolute maxima, of `grid.scale_shape`; ragged blocks at the edge count what is there."""
    if grid.strategy != "block":
        low, high = torch.aminmax(grouped(weight_OI, grid), dim=-1)
        return torch.maximum(-low, high).float()
    assert grid.block_structure
    tall, wide = grid.block_structure
    rows, columns = weight_OI.shape
    padded = torch.nn.functional.pad(weight_OI, (0, -columns % wide, 0, -rows % tall))
    blocks = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide)
    return blocks.abs().amax((1, 3)).float()
