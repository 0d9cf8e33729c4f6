"""Delta-Aware Quantization: scales, and the side to which weights are rounded, chosen for what training changed (2603.22324).

Names as in `kernels.delta_sums`. Departures from the paper are in DESIGN.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from angelslim_core.io.checkpoint import torch_dtype
from angelslim_core.rounding import E2M1_MAX, cast_e4m3, e2m1_codes
from angelslim_core.schemes import Grid

from ..kernels.delta_sums import DELTA_SUMS, ROUND_PULLED, Candidates, Elements, Sums
from . import fp8, integer
from .amax import grouped

Metric = Literal["sign", "cosine", "mse", "joint"]
# a change of this size or less is none (paper, section 3.2)
THRESHOLD = 1e-5
# what a search may have in memory, in numbers of its sums
_ROOM = 1 << 20
# sums in another order differ by less, in parts
_SUMMING = 1e-6
# histogram of the ratios that were chosen
BINS = 16


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
    ruler = _Ruler(weight_TN, grid, global_scale)
    candidates = 49 if search.dense else 16
    count = max(1, _ROOM // candidates if weight_OI.device.type == "cpu" else (_ROOM << 6) // candidates)
    pieces = [slice(start, start + count) for start in range(0, len(weight_TN), count)]
    parts = [_Choice(ruler, piece, weight_TN[piece], base_TN[piece], search) for piece in pieces]
    if search.max_projection is not None:
        pull = _pull(parts, search.max_projection)
        if pull:
            for part in parts:
                part.pull(pull)
    levels = [part.codes() for part in parts]
    scales = [part.scale_T for part in parts]
    zeros = [part.zero_T for part in parts if part.zero_T is not None]
    totals = [part.totals() for part in parts]
    codes = untiled(torch.cat(levels), grid, (weight_OI.shape[0], weight_OI.shape[1]))
    shape = grid.scale_shape((weight_OI.shape[0], weight_OI.shape[1]))
    found = torch.stack(totals).sum(0).tolist()  # where nothing is pulled, the only wait for a GPU
    counts = [weight_OI.numel(), *(int(n) for n in found[12:16])]
    whole = Totals(found[:6], found[6:12], counts, found[16], [int(n) for n in found[17:]])
    return Stored(codes, torch.cat(scales).reshape(shape), torch.cat(zeros).reshape(shape) if zeros else None, whole)


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


class _Ruler:
    """The scales of a grid at multiples of absmax's."""

    def __init__(self, weight_TN: Tensor, grid: Grid, global_scale: Tensor | None) -> None:
        self.grid, self.global_scale = grid, global_scale
        self.elements: Elements = "int" if grid.type == "int" else "e4m3" if grid.bits == 8 else "e2m1"
        self.half = 1 << (grid.bits - 1) if grid.type == "int" else 0
        low, high = torch.aminmax(weight_TN, dim=1)
        self._low, self._high = low.float().clamp_(max=0), high.float().clamp_(min=0)
        self._amax = torch.maximum(-self._low, self._high)

    def scales(self, piece: slice, ratio_CT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales [C, T] as they are stored, and zero points."""
        if self.grid.type == "int":
            return integer.scale_of(self._low[piece] * ratio_CT, self._high[piece] * ratio_CT, self.grid)
        amax = self._amax[piece]
        if self.global_scale is None:
            scale = fp8.scale_of(amax, self.grid).float() * ratio_CT
            return scale.to(torch_dtype(self.grid.scale_dtype)), None
        found = cast_e4m3((amax / E2M1_MAX / self.global_scale) * ratio_CT)
        least = found.view(torch.uint8).clamp(min=1).view(torch.float8_e4m3fn).float()
        return torch.where(amax > 0, least, 1.0).to(torch.float8_e4m3fn), None

    def step(self, scale: Tensor) -> Tensor:
        """What an element value is multiplied by."""
        return scale.float() if self.global_scale is None else scale.float() * self.global_scale


def _pull(parts: Sequence[_Choice], projection: float) -> float:
    """The pull with which all tiles together reach a projection, at most; 0 if they do without.

    A weight goes to its other neighbour if |d| times the pull reaches past the middle between both: those first that gain
    most of d for what they add in squared error.
    """
    learned = float(sum(part.sums.learned_T.sum(dtype=torch.float64) for part in parts))

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


class _Choice:
    """The best scale of each of some tiles."""

    def __init__(self, ruler: _Ruler, piece: slice, weight_TN: Tensor, base_TN: Tensor, search: Search) -> None:
        self.ruler, self.piece, self.search = ruler, piece, search
        self.weight_TN, self.base_TN = weight_TN, base_TN
        one = torch.ones(1, len(weight_TN), device=weight_TN.device)
        if search.dense:
            points = search.lowest + (search.highest - search.lowest) / 48 * torch.arange(48, device=one.device)
            ratio, sums = self._tried(torch.cat([one, points[:, None].expand(-1, one.shape[1])]))
        else:
            points = torch.linspace(search.lowest, search.highest, 5, device=one.device)
            ratio, sums = self._tried(torch.cat([one, points[:, None].expand(-1, one.shape[1])]))
            near = (search.highest - search.lowest) / 8
            center = _at(ratio, best(sums, search.metric))
            low, high = (center - near).clamp(min=search.lowest), (center + near).clamp(max=search.highest)
            fine, found = self._tried(low + (high - low) * torch.linspace(0, 1, 10, device=one.device)[:, None])
            ratio = torch.cat([ratio, fine])
            sums = sums.joined(found)
        chosen = best(sums, search.metric)
        self.ratio_T = _at(ratio, chosen)
        self.absmax, self.sums = _rows(sums, torch.zeros_like(chosen)), _rows(sums, chosen)
        scale, zero = ruler.scales(piece, self.ratio_T[None])
        self.scale_T, self.zero_T = scale[0], None if zero is None else zero[0]
        self.pull_T = torch.zeros_like(self.ratio_T)

    def _tried(self, ratio_CT: Tensor) -> tuple[Tensor, Sums]:
        scale, zero = self.ruler.scales(self.piece, ratio_CT)
        return ratio_CT, self._sums(self.ruler.step(scale), zero, (0.0,) * len(ratio_CT))

    def _sums(self, step_CT: Tensor, zero_CT: Tensor | None, pulls: tuple[float, ...]) -> Sums:
        zero = None if zero_CT is None else zero_CT.float()
        found: Sums = DELTA_SUMS(self.weight_TN, self.base_TN, Candidates(self.ruler.elements, step_CT, zero, pulls, self.ruler.half), THRESHOLD)
        return found

    def pulled(self, pulls: Sequence[float]) -> Sums:
        """The sums under the scales that were chosen, with each pull."""
        step = self.ruler.step(self.scale_T)[None].expand(len(pulls), -1)
        zero = None if self.zero_T is None else self.zero_T[None].expand(len(pulls), -1)
        return self._sums(step, zero, tuple(pulls))

    def pull(self, pull: float) -> None:
        """Pull the tiles that keep more by it than under absmax; the metric is the search's, or the cosine for mse."""
        sums = self.pulled((pull,))
        metric = "cosine" if self.search.metric == "mse" else self.search.metric
        worse = best(self.absmax.joined(sums), metric) == 0
        self.pull_T = torch.where(worse, 0, pull)
        kept = [torch.where(worse, old, new) for old, new in zip(self.sums[:4], sums[:4], strict=True)]
        self.sums = Sums(kept[0], kept[1], kept[2], kept[3], sums.changed_T, sums.learned_T)

    def codes(self) -> Tensor:
        """Codes [T, N]."""
        ruler = self.ruler
        zero = None if self.zero_T is None else self.zero_T.float()
        base, pull = (None, None) if self.search.max_projection is None else (self.base_TN, self.pull_T)
        levels = ROUND_PULLED(self.weight_TN, base, ruler.step(self.scale_T), zero, pull, ruler.elements, ruler.half)
        if ruler.elements == "int":
            return levels.to(torch.int8)
        return cast_e4m3(levels) if ruler.elements == "e4m3" else e2m1_codes(levels)

    def totals(self) -> Tensor:
        """The numbers of `Totals`, all but that of weights."""
        own = self.sums.changed_T > 0
        numbers = []
        for sums in (self.absmax, self.sums):
            rows = (spr(sums)[0] * own, cosine(sums)[0] * own, sums.error_CT[0], sums.kept_CT[0], sums.dot_CT[0], sums.found_CT[0])
            numbers += [row.sum(dtype=torch.float64) for row in rows]
        moved = own & ((self.ratio_T != 1) | (self.pull_T != 0))
        lost = own & (self.sums.found_CT[0] == 0)
        numbers += [n.sum(dtype=torch.float64) for n in (self.sums.changed_T, own, moved, lost, self.sums.learned_T)]
        part = (self.ratio_T - self.search.lowest) / (self.search.highest - self.search.lowest)
        place = (part * BINS).long().clamp(0, BINS - 1)
        ratios = torch.zeros(BINS, dtype=torch.float64, device=own.device).index_add_(0, place, own.double())
        return torch.cat([torch.stack(numbers), ratios])


def spr(sums: Sums) -> Tensor:
    """Sign preservation rate [C, T]: of the weights that changed, those that moved the same way (paper, equation 4)."""
    return sums.kept_CT / sums.changed_T.clamp(min=1)


def cosine(sums: Sums) -> Tensor:
    """Cosine [C, T] of d and d' (paper, equation 5)."""
    return sums.dot_CT / (sums.learned_T.sqrt().clamp(min=1e-10) * sums.found_CT.sqrt().clamp(min=1e-10))


def best(sums: Sums, metric: Metric, excluded_CT: Tensor | None = None) -> Tensor:
    """Index [T] of the best candidate; the first one, absmax, unless another is better by more than rounding."""
    signs, angles = spr(sums), cosine(sums)
    score = {"sign": signs, "cosine": angles, "joint": (signs + angles) / 2, "mse": -sums.error_CT}[metric]
    worse = torch.zeros_like(score, dtype=torch.bool) if excluded_CT is None else excluded_CT.clone()
    if metric == "joint":
        worse |= (signs < signs[0]) | (angles < angles[0])
    score = score.masked_fill(worse, -math.inf)
    chosen = score.argmax(0)
    better = _at(score, chosen) > score[0] + score[0].abs() * _SUMMING
    return torch.where(better, chosen, 0)


def _at(values_CT: Tensor, index_T: Tensor) -> Tensor:
    return values_CT.gather(0, index_T[None])[0]


def _rows(sums: Sums, index_T: Tensor) -> Sums:
    """The sums of one candidate a tile, C = 1."""
    kept, dot, found, error = (_at(rows, index_T)[None] for rows in sums[:4])
    return Sums(kept, dot, found, error, sums.changed_T, sums.learned_T)
