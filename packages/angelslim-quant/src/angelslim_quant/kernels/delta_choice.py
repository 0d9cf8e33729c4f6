"""The scale of each tile: those that are tried, the best of them by a metric, and what tiles keep under it (DAQ, 2603.22324, section 3).

Names as in `delta_sums`. Tiles are many and each has few numbers, so that on a GPU each step is one launch for all of it.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.rounding import E2M1_MAX, cast_e4m3
from angelslim_core.schemes import Grid

from . import quantize_fp8, quantize_groups
from .delta_sums import Scales, Sums

Metric = Literal["sign", "cosine", "mse", "joint"]
# sums in another order differ by less, in parts
SUMMING = 1e-6
# histogram of the ratios that were chosen
BINS = 16


class Span(NamedTuple):
    """What scales are made of.

    Args:
        low_T, high_T: lowest and highest weight of each tile, any float dtype.
        grid: FP8, integers or NVFP4.
        global_scale: [1], of NVFP4.
    """

    low_T: Tensor
    high_T: Tensor
    grid: Grid
    global_scale: Tensor | None


class Around(NamedTuple):
    """Where of a range ratios are tried: up to `near` from each tile's `center_T`, and between `lowest` and `highest`."""

    center_T: Tensor
    near: float
    lowest: float
    highest: float


class Choice(NamedTuple):
    """What was chosen for each tile.

    Args:
        ratio_T: its scale in parts of absmax's.
        sums: of two candidates: absmax's and what was chosen.
    """

    ratio_T: Tensor
    sums: Sums


def scales(span: Span, points_CT: Tensor, around: Around | None) -> tuple[Tensor, Scales]:
    """The ratios [C, T] to absmax's scale that are tried, and the scales.

    Args:
        points_CT: fp32, the ratios, or what part of the way from the least to the largest `around` leaves; one row of tiles may
            stand for all (stride 0).
    """
    low, high = span.low_T.float().clamp(max=0), span.high_T.float().clamp(min=0)
    ratio = points_CT
    if around is not None:
        least, most = (around.center_T - around.near).clamp(min=around.lowest), (around.center_T + around.near).clamp(max=around.highest)
        ratio = least + (most - least) * points_CT
    if span.grid.type == "int":
        scale, zero = quantize_groups.scale_of(low * ratio, high * ratio, span.grid)
        return ratio, Scales(scale, zero, span.grid)
    amax = torch.maximum(-low, high)
    if span.global_scale is None:
        scale = quantize_fp8.scale_of(amax, span.grid).float() * ratio
        return ratio, Scales(scale.to(torch_dtype(span.grid.scale_dtype)), None, span.grid)
    # a tensor on the device: PyTorch multiplies by the inverse of a number on GPUs, which is another result
    found = cast_e4m3((amax / amax.new_full((), E2M1_MAX) / span.global_scale) * ratio)
    least_code = found.view(torch.uint8).clamp(min=1).view(torch.float8_e4m3fn).float()
    return ratio, Scales(torch.where(amax > 0, least_code, 1.0).to(torch.float8_e4m3fn), None, span.grid, span.global_scale)


def spr(sums: Sums) -> Tensor:
    """Sign preservation rate [C, T]: of the weights that changed, those that moved the same way (paper, equation 4)."""
    return sums.kept_CT / sums.changed_T.clamp(min=1)


def cosine(sums: Sums) -> Tensor:
    """Cosine [C, T] of d and d' (paper, equation 5)."""
    return sums.dot_CT / (sums.learned_T.sqrt().clamp(min=1e-10) * sums.found_CT.sqrt().clamp(min=1e-10))


def choose(ratio_CT: Tensor, sums: Sums, metric: Metric, before: Choice | None) -> Choice:
    """The best candidate of each tile; the first one, absmax, unless another is better by more than rounding.

    Args:
        ratio_CT: of the candidates; one row of tiles may stand for all (stride 0).
        metric: see `numerics.delta.Search`.
        before: what was chosen of earlier candidates, absmax's among them, which are the first then.
    """
    if before is not None:
        ratio_CT, sums = torch.cat([torch.ones_like(ratio_CT[:1]), before.ratio_T[None], ratio_CT]), before.sums.joined(sums)
    signs, angles = spr(sums), cosine(sums)
    score = {"sign": signs, "cosine": angles, "joint": (signs + angles) / 2, "mse": -sums.error_CT}[metric]
    if metric == "joint":
        score = score.masked_fill((signs < signs[0]) | (angles < angles[0]), -math.inf)
    best = score.argmax(0, keepdim=True)
    better = score.gather(0, best) > score[0] + score[0].abs() * SUMMING
    chosen = torch.where(better, best, 0)
    kept = sums.tried_C4T.gather(0, chosen[:, None].expand(-1, 4, -1))
    return Choice(ratio_CT.gather(0, chosen)[0], Sums(torch.cat([sums.tried_C4T[:1], kept]), sums.own_2T))


def totals(choice: Choice, pull_T: Tensor | None, lowest: float, highest: float) -> Tensor:
    """fp64 sums over tiles: six under the scales of absmax and six as chosen, then weights that changed, tiles where one did, those
    of them that moved and that lost all, sum of d^2, `BINS` counts of ratios; as `numerics.delta.Totals` has them.

    Args:
        pull_T: what weights were pulled by, if they were.
        lowest, highest: of the ratios that are counted.
    """
    sums, ratio_T = choice.sums, choice.ratio_T
    own = sums.changed_T > 0
    signs, angles = spr(sums), cosine(sums)
    numbers = []
    for side in range(2):
        rows = (signs[side] * own, angles[side] * own, sums.error_CT[side], sums.kept_CT[side], sums.dot_CT[side], sums.found_CT[side])
        numbers += [row.sum(dtype=torch.float64) for row in rows]
    moved = own & (ratio_T != 1 if pull_T is None else (ratio_T != 1) | (pull_T != 0))
    lost = own & (sums.found_CT[1] == 0)
    numbers += [n.sum(dtype=torch.float64) for n in (sums.changed_T, own, moved, lost, sums.learned_T)]
    place = ((ratio_T - lowest) / (highest - lowest) * BINS).long().clamp(0, BINS - 1)
    ratios = torch.zeros(BINS, dtype=torch.float64, device=own.device).index_add_(0, place, own.double())
    return torch.cat([torch.stack(numbers), ratios])


def _triton_scales(span: Span, points_CT: Tensor, around: Around | None) -> tuple[Tensor, Scales]:
    from .triton.delta_choice import scales

    return scales(span, points_CT, around)


def _triton_choose(ratio_CT: Tensor, sums: Sums, metric: Metric, before: Choice | None) -> Choice:
    from .triton.delta_choice import choose

    return choose(ratio_CT, sums, metric, before)


def _triton_totals(choice: Choice, pull_T: Tensor | None, lowest: float, highest: float) -> Tensor:
    from .triton.delta_choice import totals

    return totals(choice, pull_T, lowest, highest)


def _on_gpu(of: Span | Choice | Tensor, *_: object) -> tuple[bool, str]:
    first = of if isinstance(of, Tensor) else of[0]
    return first.is_cuda, "tensors on a GPU"


DELTA_SCALES = Kernel("quant.delta_scales", scales, (Implementation("triton", _triton_scales, _on_gpu, triton_runs), Implementation("torch", scales)))
DELTA_CHOICE = Kernel("quant.delta_choice", choose, (Implementation("triton", _triton_choose, _on_gpu, triton_runs), Implementation("torch", choose)))
DELTA_TOTALS = Kernel("quant.delta_totals", totals, (Implementation("triton", _triton_totals, _on_gpu, triton_runs), Implementation("torch", totals)))
