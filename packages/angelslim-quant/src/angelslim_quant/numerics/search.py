"""Choosing the scale of each group by the error of what will be stored, without data.

The error is the sum of fourth powers: rounding noise of small weights averages out over a dot product, while a large
weight that is cut short does not, so large errors must count more than squares count them (see DESIGN.md for figures).
"""

from __future__ import annotations

import torch
from angelslim_core.schemes import Grid, dequantize
from torch import Tensor

from .amax import grouped
from .integer import quantize, range_of

# factors on the range that covers every weight, 1 first: it is kept on a tie
RATIOS = (1.0, 1.1, 1.06, 1.02, 0.98, 0.94, 0.9, 0.86, 0.82)
# weights whose candidates are held in memory at once
CHUNK = 1 << 22


def quantize_searched(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Like `integer.quantize`, with each group's scale the best of `RATIOS` times the one its range gives."""
    rows = max(1, CHUNK // weight_OI.shape[1])
    parts = [_search(chunk, grid) for chunk in weight_OI.split(rows)]
    codes, scales, zeros = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)


def _search(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    least = torch.empty(0)
    reference = weight_OI.float()
    for ratio in RATIOS:
        scale, zero = range_of(weight_OI * ratio if ratio != 1 else weight_OI, grid)
        codes, _, _ = quantize(weight_OI, grid, scale, zero)
        error = dequantize(codes, scale, zero, grid).sub_(reference).square_().square_()
        error = grouped(error, grid).sum(-1)
        if best is None:
            best, least = (codes, scale, zero), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        chosen = grouped(best[0], grid)
        chosen = torch.where(better[..., None], grouped(codes, grid), chosen).reshape(codes.shape)
        kept_zero = None if zero is None or best[2] is None else torch.where(better, zero, best[2])
        best = (chosen, torch.where(better, scale, best[1]), kept_zero)
    assert best is not None
    return best
