"""HiPrune: objects by a middle layer, what is around them, and the whole by a late layer (arXiv 2508.00553, anchor, buffer and register tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..budget import Scope
from ..picking import LAYER_MEANING, check_finite, kept, numbers, of_layer, ranks
from ..plan import Need, Plan, Pool
from .base import Strategy


class HiPrune(Strategy):
    """Keep the tokens that a middle layer of the encoder attends to, their neighbours, and by a late layer's attention as many as are missing.

    round(alpha K / 5) tokens are anchors, at least one of five kept ones; each brings the tokens left, right, above and below it, held within
    its image: in a first or last column they are those of the row before or after, as in the published code. Where so many are more
    than K, anchors come first, then what is left of them, right, above, below.
    """

    name = "hiprune"

    budget_scope: Scope = Field("image", description="what the budget is of: prompt; image: its share of the prompt's; frame: of a video's")
    object_layer: int | None = Field(
        None, description="the middle layer, from 0; none given: the published one, 8 of CLIP and 15 of Qwen2.5-VL; 13 of Qwen3-VL"
    )
    layer: int | None = Field(None, description=LAYER_MEANING)
    alpha: float = Field(0.1, ge=0, le=1, description="share of the kept tokens that are anchors and neighbours; 0: by the late layer alone")
    score: Literal["received", "importance"] = Field(
        "received", description="received: of all queries, as published; importance: of the class token where there is one"
    )

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("encoder", "objects" if self.object_layer is None else self.object_layer, self.score), of_layer(self.layer, self.score))

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        objects, whole = (pool.statistics[need].float() for need in self.needs)
        anchors = [max(round(self.alpha * k / 5), int(self.alpha > 0 and k >= 5)) for k in keep]
        most = max(anchors, default=0)
        first = _neighbours(pool, ranks(objects, pool.valid), numbers(anchors, pool), most)
        # what is near an anchor in its order, then the others in theirs: K of that
        order = torch.where(first < 5 * most, first, 5 * most + ranks(whole, pool.valid))
        chosen = pool.valid & (ranks(-order.float(), pool.valid) < numbers(keep, pool)[:, None])
        check_finite(pool, objects, whole)
        return Plan(kept(chosen, keep))


def _neighbours(pool: Pool, place: Tensor, anchors: Tensor, most: int) -> Tensor:
    """[P, N], int64: when each token comes in, 0 the first anchor; 5 * most: it is no anchor and near none.

    Args:
        place: [P, N], of each token in the order of the middle layer.
        anchors: [P], of each pool; `most` is the largest.
    """
    width, low, high = _layout(pool)
    pools, tokens = place.shape
    token = torch.argsort(place, 1)[:, :most]  # [P, A]: the anchors, and what is none in pools of fewer
    steps = torch.stack([torch.zeros_like(width), -torch.ones_like(width), torch.ones_like(width), -width, width], 1).gather(
        2, token[:, None].expand(-1, 5, -1)
    )
    near = torch.clamp(token[:, None] + steps, low.gather(1, token)[:, None], high.gather(1, token)[:, None])  # [P, 5, A]
    none = torch.arange(most, device=place.device) >= anchors[:, None]
    near = near.masked_fill(none[:, None], tokens).flatten(1)
    when = torch.arange(5 * most, device=place.device).expand(pools, -1)
    first = torch.full((pools, tokens + 1), 5 * most, device=place.device)
    return first.scatter_reduce_(1, near, when, "amin")[:, :-1]


def _layout(pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    """[P, N] each, of every token: the width of its image, and the first and the last token of it."""
    tokens, device = pool.features.shape[1], pool.features.device
    segments = torch.zeros_like(pool.valid, dtype=torch.int64) if pool.segments is None else pool.segments
    # what is no token is of a segment of its own
    sizes = torch.zeros(len(segments), tokens + 1, dtype=torch.int64, device=device)
    sizes.scatter_add_(1, segments.masked_fill(~pool.valid, tokens), torch.ones_like(segments))
    segments = segments.masked_fill(~pool.valid, 0)
    high = (sizes.cumsum(1) - 1).gather(1, segments)
    size = sizes.gather(1, segments)
    if not any(pool.grids):  # square, for want of better knowledge
        return size.double().sqrt().long(), high - size + 1, high
    columns = torch.ones(len(segments), max(1, *map(len, pool.grids)), dtype=torch.int64)
    for row, grids in zip(columns, pool.grids, strict=True):
        row[: len(grids)] = torch.tensor([grid.columns for grid in grids])
    return columns.to(device, non_blocking=True).gather(1, segments), high - size + 1, high
