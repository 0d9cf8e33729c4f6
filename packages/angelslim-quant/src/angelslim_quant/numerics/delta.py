"""Delta-Aware Quantization: scales, and the side to which weights are rounded, chosen for what training changed (2603.22324).

Names as in `kernels.delta_sums`. Departures from the paper are in DESIGN.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from angelslim_core.schemes import Grid

from ..kernels.delta_choice import BINS, DELTA_CHOICE, DELTA_SCALES, DELTA_TOTALS, Around, Choice, Metric, Span
from ..kernels.delta_sums import DELTA_CODES, DELTA_SUMS, Scales, Sums
from .amax import grouped

# a change of this size or less is none (paper, section 3.2)
THRESHOLD = 1e-5
# what a search may have in memory, in numbers of its sums
_ROOM = 1 << 20


@dataclass(frozen=True)
class Search:
    """What is tried for each tile.

    Args:
        metric: what is to be largest. sign: the rate of preserved signs; cosine: of d and d'; joint: their mean, with
            neither below absmax's; mse: least squared error, blind to d.
        lowest, highest: ratios to the scale of absmax.
        dense: 48 ratios from lowest, evenly spaced, without highest; else 5 with both, then 10 around the best of them.
        max_projection: None: weights are rounded to nearest. Else they are pulled along d, all by the same part of it, until
            d' reaches that far along d as a whole: <d, d'> = max_projection <d, d>.
    """

    metric: Metric = "joint"
    lowest: float = 0.8
    highest: float = 1.5
    dense: bool = False
    max_projection: float | None = None


@dataclass
class Totals:
    """What tiles keep, summed, so that it can be added up over a model.

    Args:
        absmax, chosen: [sum of SPR over tiles, of cosine, sum of squared errors, of kept, of d d', of d'^2], under the
            scales of absmax and as stored.
        counts: [weights, weights that changed, tiles where one did, of those: stored otherwise than absmax would, where
            nothing of the change is left (d' = 0)].
        learned: sum of d^2.
        ratios: the changed tiles' scales, by `BINS` even parts of the range that was searched.
    """

    absmax: list[float]
    chosen: list[float]
    counts: list[int]
    learned: float
    ratios: list[int]

    def as_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


def summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `Totals` of several weights say together: pooled numbers for the report."""
    if not parts:
        return {}
    fields = ("absmax", "chosen", "counts", "ratios")
    absmax, chosen, counts, ratios = ([math.fsum(column) for column in zip(*(p[name] for p in parts), strict=True)] for name in fields)
    learned = math.fsum(p["learned"] for p in parts)
    weights, changed, tiles, moved, lost = counts
    found: dict[str, Any] = {"weights_changed": changed / weights, "tiles": int(tiles), "tiles_moved": int(moved), "tiles_lost": int(lost)}
    for suffix, sums in (("_absmax", absmax), ("", chosen)):
        found[f"spr{suffix}"] = sums[3] / max(1, changed)
        found[f"cosine{suffix}"] = sums[4] / max(1e-20, math.sqrt(learned) * math.sqrt(sums[5]))
        found[f"mse{suffix}"] = sums[2] / weights
    places = [[i, count] for i, count in enumerate(ratios)]
    return found | {"curves": [{"title": "Scales that were chosen", "x": f"part of the range searched, of {BINS}", "y": "tiles", "points": places}]}


class Stored(NamedTuple):
    """A weight as it is stored: see `schemes.Quantized`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    totals: Totals


def quantize(weight_OI: Tensor, base_OI: Tensor, grid: Grid, search: Search, global_scale: Tensor | None = None) -> Stored:
    """The weight, stored so that d survives.

    Args:
        weight_OI: any float dtype, trained from `base_OI`.
        grid: FP8 of strategy "channel" or "block", integers of strategy "group", or NVFP4.
        global_scale: [1], of NVFP4.
    """
    weight_TN, base_TN = tiles(weight_OI, grid), tiles(base_OI, grid)
    low_T, high_T = torch.aminmax(weight_TN, dim=1)
    candidates = 49 if search.dense else 16
    count = max(1, _ROOM // candidates if weight_OI.device.type == "cpu" else (_ROOM << 6) // candidates)
    pieces = [slice(start, start + count) for start in range(0, len(weight_TN), count)]
    parts = [_Part(Span(low_T[piece], high_T[piece], grid, global_scale), weight_TN[piece], base_TN[piece], search) for piece in pieces]
    if search.max_projection is not None:
        pull = _pull(parts, search.max_projection)
        if pull:
            for part in parts:
                part.pull(pull)
    shape = grid.scale_shape((weight_OI.shape[0], weight_OI.shape[1]))
    codes = untiled(_whole([part.codes() for part in parts]), grid, (weight_OI.shape[0], weight_OI.shape[1]))
    scale = _whole([part.scales.scale_CT[0] for part in parts]).reshape(shape)
    zeros = [part.scales.zero_CT[0] for part in parts if part.scales.zero_CT is not None]
    totals = [part.totals() for part in parts]
    found = (totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)).tolist()  # where nothing is pulled, the only wait for a GPU
    counts = [weight_OI.numel(), *(int(n) for n in found[12:16])]
    whole = Totals(found[:6], found[6:12], counts, found[16], [int(n) for n in found[17:]])
    return Stored(codes, scale, _whole(zeros).reshape(shape) if zeros else None, whole)


def _whole(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def tiles(weight_OI: Tensor, grid: Grid) -> Tensor:
    """[T, N]: what shares a scale in one row; ragged blocks are filled up by 0."""
    if grid.strategy != "block":
        return grouped(weight_OI, grid).reshape(-1, grid.group_size or weight_OI.shape[1])
    assert grid.block_structure
    tall, wide = grid.block_structure
    rows, columns = weight_OI.shape
    more = (0, -columns % wide, 0, -rows % tall)
    padded = torch.nn.functional.pad(weight_OI, more) if any(more) else weight_OI
    return padded.unflatten(0, (-1, tall)).unflatten(2, (-1, wide)).transpose(1, 2).reshape(-1, tall * wide)


def untiled(tiles_TN: Tensor, grid: Grid, shape: tuple[int, int]) -> Tensor:
    """The inverse of `tiles`."""
    if grid.strategy != "block":
        return tiles_TN.reshape(shape)
    assert grid.block_structure
    (tall, wide), (rows, columns) = grid.block_structure, shape
    blocks = tiles_TN.view(-(-rows // tall), -(-columns // wide), tall, wide)
    return blocks.transpose(1, 2).reshape(blocks.shape[0] * tall, -1)[:rows, :columns].contiguous()


@lru_cache
def _points(lowest: float, highest: float, dense: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ratios [C, 1] that are tried first, absmax's before all; parts [10, 1] of the way around the best of them."""
    spaced = lowest + (highest - lowest) / 48 * torch.arange(48) if dense else torch.linspace(lowest, highest, 5)
    return torch.cat([torch.ones(1), spaced])[:, None].to(device), torch.linspace(0, 1, 10)[:, None].to(device)


def _pull(parts: Sequence[_Part], projection: float) -> float:
    """The pull with which all tiles together reach a projection, at most; 0 if they do without.

    A weight goes to its other neighbour if |d| times the pull reaches past the middle between both: those first that gain
    most of d for what they add in squared error.
    """
    learned = float(sum(part.choice.sums.learned_T.sum(dtype=torch.float64) for part in parts))

    def largest(pulls: list[float]) -> int:
        """How many of the pulls, in order, stay within the projection."""
        dots = sum(part.pulled(pulls).dot_CT.sum(1, dtype=torch.float64) for part in parts)
        assert isinstance(dots, Tensor)
        within = (dots <= projection * learned).tolist()
        return within.index(False) if False in within else len(within)

    if not learned or not math.isfinite(learned):
        return 0.0
    pulls = [0.0, *(2.0**k for k in range(-4, 8))]
    place = largest(pulls)
    if place in (0, len(pulls)):
        return 0.0 if place == 0 else pulls[-1]
    low, high = pulls[place - 1], pulls[place]
    fine = [low + (high - low) * k / 12 for k in range(13)]
    return fine[max(1, largest(fine)) - 1]


class _Part:
    """The best scale of each of some tiles."""

    def __init__(self, span: Span, weight_TN: Tensor, base_TN: Tensor, search: Search) -> None:
        self.span, self.search = span, search
        self.weight_TN, self.base_TN = weight_TN, base_TN
        first, fine = _points(search.lowest, search.highest, search.dense, weight_TN.device)
        self.choice = self._best(first, None, None)
        if not search.dense:
            around = Around(self.choice.ratio_T, (search.highest - search.lowest) / 8, search.lowest, search.highest)
            self.choice = self._best(fine, around, self.choice)
        self.scales: Scales = DELTA_SCALES(span, self.choice.ratio_T[None], None)[1]
        self.pull_T = None if search.max_projection is None else torch.zeros_like(self.choice.ratio_T)

    def _best(self, points_C1: Tensor, around: Around | None, before: Choice | None) -> Choice:
        ratio_CT, scales = DELTA_SCALES(self.span, points_C1.expand(-1, len(self.weight_TN)), around)
        return DELTA_CHOICE(ratio_CT, DELTA_SUMS(self.weight_TN, self.base_TN, scales, (), THRESHOLD), self.search.metric, before)

    def pulled(self, pulls: Sequence[float]) -> Sums:
        """The sums under the scales that were chosen, with each pull."""
        scale, zero = self.scales[:2]
        many = self.scales._replace(scale_CT=scale.expand(len(pulls), -1), zero_CT=None if zero is None else zero.expand(len(pulls), -1))
        return DELTA_SUMS(self.weight_TN, self.base_TN, many, pulls, THRESHOLD)

    def pull(self, pull: float) -> None:
        """Pull the tiles that keep more by it than under absmax; the metric is the search's, or the cosine for mse."""
        absmax, chosen, sums = self.choice.sums.only(0), self.choice.sums.only(1), self.pulled((pull,))
        metric = "cosine" if self.search.metric == "mse" else self.search.metric
        pulls = torch.arange(2, device=sums.own_2T.device)[:, None] * pull  # a list would be copied there, and wait for the GPU
        self.pull_T = DELTA_CHOICE(pulls.expand(-1, len(self.weight_TN)), absmax.joined(sums), metric, None).ratio_T
        kept = Sums(torch.where(self.pull_T == 0, chosen.tried_C4T, sums.tried_C4T), sums.own_2T)
        self.choice = Choice(self.choice.ratio_T, absmax.joined(kept))

    def codes(self) -> Tensor:
        """Codes [T, N]."""
        return DELTA_CODES(self.weight_TN, None if self.pull_T is None else self.base_TN, self.scales, self.pull_T)

    def totals(self) -> Tensor:
        """The numbers of `Totals`, all but that of weights."""
        return DELTA_TOTALS(self.choice, self.pull_T, self.search.lowest, self.search.highest)
