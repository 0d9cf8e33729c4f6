"""Largest magnitudes of a weight, per whatever shares a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim_core.schemes import Grid, pieces


def grouped(weight_OI: Tensor, grid: Grid) -> Tensor:
    """The weight as [..., values that share a scale]; strategies "tensor", "channel" and "group"."""
    if grid.strategy == "tensor":
        return weight_OI.reshape(1, -1)
    if grid.strategy == "channel":
        return weight_OI[:, None]
    assert grid.group_size
    return weight_OI.unflatten(1, (-1, grid.group_size))


def extremes(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """fp32 lowest and highest values, of `grid.scale_shape`; strategies "tensor", "channel" and "group"."""
    if weight_OI.device.type != "cpu" or grid.strategy == "tensor":
        low, high = torch.aminmax(grouped(weight_OI, grid), dim=-1)
        return low.float(), high.float()
    # on a CPU the two reductions of fp32 in its cache are vector code, the joint one and those of half precision are not
    found = [(values.amin(-1), values.amax(-1)) for rows in pieces(weight_OI, grid) for values in (grouped(weight_OI[rows].float(), grid),)]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def amax_of(weight_OI: Tensor, grid: Grid) -> Tensor:
    """fp32 absolute maxima, of `grid.scale_shape`; ragged blocks at the edge count what is there."""
    if grid.strategy != "block":
        low, high = extremes(weight_OI, grid)
        return torch.maximum(-low, high)
    assert grid.block_structure
    tall, wide = grid.block_structure
    found = []
    for rows in pieces(weight_OI, grid):
        part = weight_OI[rows]
        padded = torch.nn.functional.pad(part, (0, -part.shape[1] % wide, 0, -part.shape[0] % tall))
        blocks = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide)
        found.append(blocks.abs().amax((1, 3)).float())
    return torch.cat(found)
