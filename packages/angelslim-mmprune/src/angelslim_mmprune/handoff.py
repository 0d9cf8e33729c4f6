"""For engines: how many tokens of an image, video or clip will stay, before it is encoded, and which, from its features alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .budget import Budget, split
from .plan import Grid, Need, Pool
from .strategies import make_strategy
from .strategies.base import Strategy


@dataclass(frozen=True)
class Selection:
    """What stays of one image, video or clip.

    Args:
        keep: [K], int64, ascending: numbers of the tokens that stay; positions are those that these had.
        features: [K, D], of the dtype that was given: the language model's input in the place of K placeholders.
        groups: [N], int64: which of the K each token went into, -1 none; None: nothing was merged.
    """

    keep: Tensor
    features: Tensor
    groups: Tensor | None


def planned_count(grid: Grid | Sequence[int], budget: Budget) -> int:
    """Tokens of one image, video or clip that will stay; depends on its size alone.

    Args:
        grid: frames, rows and columns in tokens of the language model; a clip has one frame and one row.
        budget: a strategy is one too.

    Raises:
        UsageError: no grid, or more tokens are to be kept than there are.
    """
    return sum(_shares(_grid(grid), budget))


def plan_from_features(
    features: Tensor, grid: Grid | Sequence[int], strategy: Strategy | str = "divprune", *, statistics: Mapping[Need, Tensor] | None = None, **options: Any
) -> Selection:  # fmt: skip
    """Choose among the tokens of one image, video or clip; as many stay as `planned_count` says.

    Args:
        features: [N, D], any floating dtype: what the projector gives the language model.
        grid: as for `planned_count`.
        strategy: one that prunes before the language model and reads neither it nor the prompt; by name, with options.
        statistics: of each `Need` in the strategy's `needs` [N], or [N, d] of keys: attention of the encoder.

    Raises:
        UsageError: features that do not fit the grid, a strategy that needs more than is given, or a wrong option.
        NumericError: features or statistics are NaN.
    """
    if isinstance(strategy, str):
        strategy = make_strategy(strategy, **options)
    elif options:
        raise UsageError(888, next(iter(options)), "is of a strategy that is made already")
    where = Grid(*_grid(grid))
    tokens = where.frames * where.rows * where.columns
    if features.dim() != 2 or not features.is_floating_point() or len(features) != tokens:
        raise UsageError(889, "features", f"{features.dtype} {list(features.shape)} do not fit a grid of {tokens} tokens", "give [N, D], a row a token")
    _check(strategy, statistics or {}, features)
    shares = _shares(where, strategy)
    pools = len(shares)
    grids = ((where._replace(frames=where.frames // pools),),) * pools

    def cut(values: Tensor, numbers: list[int]) -> Tensor:
        return values.view(pools, -1, *values.shape[1:])[numbers]

    kept = [torch.arange(tokens // pools if k else 0, device=features.device) for k in shares]
    groups: Tensor | None = None
    merged = features
    if chosen := [i for i, k in enumerate(shares) if 0 < k < tokens // pools]:
        given = {need: cut(values, chosen) for need, values in (statistics or {}).items()}
        pool = Pool(cut(features, chosen), (tokens // pools,) * len(chosen), None, tuple(grids[i] for i in chosen), given)
        with torch.autocast(features.device.type, enabled=False):
            plan = strategy.plan(pool, [shares[i] for i in chosen])
        for i, row in zip(chosen, plan.keep, strict=True):
            kept[i] = row[: shares[i]]
        if plan.groups is not None:
            own = cut(torch.arange(tokens, device=features.device), [*range(pools)])
            all_groups = torch.where(torch.tensor(shares, device=own.device)[:, None] > 0, own % (tokens // pools), -1)
            all_groups[chosen] = plan.groups
            starts = torch.tensor([sum(shares[:i]) for i in range(pools)], device=own.device)[:, None]
            groups = torch.where(all_groups < 0, -1, all_groups + starts).flatten()
            merged = features.clone().view(pools, -1, features.shape[1])
            found = plan.apply(pool.features)
            for i, row in enumerate(chosen):
                merged[row, kept[row]] = found[i, : shares[row]]
            merged = merged.flatten(0, 1)
    keep = torch.cat([k + i * (tokens // pools) for i, k in enumerate(kept)])
    return Selection(keep, merged[keep], groups)


def _grid(grid: Grid | Sequence[int]) -> Grid:
    if len(grid) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid):
        raise UsageError(890, "grid", f"{grid!r:.100} are no frames, rows and columns")
    return Grid(*grid)


def _shares(grid: Grid, budget: Budget) -> list[int]:
    """Tokens that stay of each pool: of the whole, or of each frame."""
    pools = grid.frames if budget.budget_scope == "frame" else 1
    size = grid.frames // pools * grid.rows * grid.columns
    if budget.keep_tokens is not None:
        return [budget.count(size)] * pools
    return split(budget.count(pools * size), [size] * pools)


def _check(strategy: Strategy, statistics: Mapping[Need, Tensor], features: Tensor) -> None:
    if strategy.reads_text or any(stage.layer is not None for stage in strategy.stages):
        raise UsageError(891, strategy.name, "reads the prompt, or prunes inside the language model", "choose one that goes by features")
    if lacking := [need for need in strategy.needs if need not in statistics]:
        what = f"{lacking[0].statistic} of the {lacking[0].source}'s layer {lacking[0].layer!r}"
        raise UsageError(892, strategy.name, f"needs {what}", "give it in `statistics`, or choose a strategy that goes by features alone")
    for need, values in statistics.items():
        wide = need.statistic in ("keys", "hidden", "raw_keys")
        if need not in strategy.needs or values.dim() != 1 + wide or len(values) != len(features) or values.device != features.device:
            what = f"{list(values.shape)} on {values.device}: not asked for, or not of {len(features)} tokens on {features.device}"
            raise UsageError(893, f"statistics: {need.statistic}", what, "give [N], of keys [N, d], where the features are")
