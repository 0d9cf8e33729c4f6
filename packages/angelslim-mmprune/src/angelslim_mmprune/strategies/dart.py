"""DART: few pivots, and the tokens that are least like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from angelslim_core.errors import UsageError

from ..finite import all_finite, require
from ..picking import kept, numbers, ranks, unit
from ..plan import Need, Plan, Pool
from .base import Modality, Stage, Strategy


class Dart(Strategy):
    """Pivots are media and text tokens with the largest keys (L1); each adds the free media tokens of the lowest cosine to it.

    Media pivots come first, the largest key first, then those of the text behind the pool. Each adds as many, ceil(what is to be added /
    pivots), until K are kept, so that K is exact; text pivots are not counted, text always stays. A budget of fewer tokens than media pivots is
    the largest keys. Of equal keys or cosines the first token counts.

    Source: arXiv:2502.11494, section 4.2, and its published code, whose quota is rounded down, so that fewer than K stay, and whose order of
    pivots is that of a set. Its cosines are of the output of the layer after the model's last norm; these are of the input of the layer's
    attention. Its pruned layer 2 is `layer` 1.

    Keys are turned by their positions, and so are their L1 norms changed: where a batch is padded on the left, `position_ids` must come with
    it, as they do in `generate`, or a row's pivots depend on its padding.
    """

    name = "dart"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"vision", "audio"})

    layer: int = Field(1, ge=0, description="layer of the language model, from 0, whose keys and input count and behind which tokens go")
    media_pivots: int = Field(4, ge=1, le=1024, description="image or audio tokens that are pivots")
    text_pivots: int = Field(4, ge=0, le=1024, description="tokens of the text behind them that are pivots too; fewer where there are not so many")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer),)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("llm", self.layer, "raw_keys"), Need("llm", self.layer, "hidden"))

    @property
    def text_needs(self) -> tuple[Need, ...]:
        return self.needs if self.text_pivots else ()

    def plan(self, pool: Pool, keep: Sequence[int]) -> Plan:
        keys, hidden = (pool.statistics[need] for need in self.needs)
        rows = unit(hidden, pool.valid)
        size = keys.float().abs().sum(2)
        finite = all_finite(pool.valid, size, hidden)
        order = ranks(size, pool.valid)
        media = [min(self.media_pivots, count) for count in keep]
        taken = (order < numbers(media, pool)[:, None]) & pool.valid
        pivots = _largest(rows, order, self.media_pivots)
        texts = [0] * len(keep)
        if self.text_pivots:
            found, texts, text_finite = self._text(pool)
            pivots, finite = torch.cat([pivots, found], 1), finite & text_finite
        left = [count - m for count, m in zip(keep, media, strict=True)]
        quota = [-(-n // (m + t)) for n, m, t in zip(left, media, texts, strict=True)]
        for pivot in range(pivots.shape[1]):
            # a pool without pivots of a number has none behind it, or nothing left
            add = [min(q, n) if pivot < self.media_pivots + t else 0 for q, n, t in zip(quota, left, texts, strict=True)]
            if not any(add):
                break
            cosine = (rows @ pivots[:, pivot, :, None])[..., 0]
            free = pool.valid & ~taken
            taken |= free & (ranks(-cosine, free) < numbers(add, pool)[:, None])
            left = [n - a for n, a in zip(left, add, strict=True)]
        plan = Plan(kept(taken, keep))
        require(finite, 867, self.name)
        return plan

    def _text(self, pool: Pool) -> tuple[Tensor, list[int], Tensor]:
        """Pivots [P, T, d] of the text behind each pool, how many each has, and whether all was finite."""
        missing = [need for need in self.needs if need not in pool.text_statistics]
        if missing or not pool.text_counts or len(pool.text_before) != len(pool.text_counts):
            raise UsageError(868, self.name, "statistics of the prompt's text were not captured", "set text_pivots to 0 to do without")
        keys, hidden = (pool.text_statistics[need] for need in self.needs)
        place = torch.arange(keys.shape[1], device=keys.device)
        behind = (place >= numbers(pool.text_before, pool)[:, None]) & (place < numbers(pool.text_counts, pool)[:, None])
        size = keys.float().abs().sum(2)
        counts = [min(self.text_pivots, count - before) for count, before in zip(pool.text_counts, pool.text_before, strict=True)]
        found = _largest(unit(hidden, behind), ranks(size, behind), self.text_pivots)
        return found, counts, all_finite(behind, size, hidden)


def _largest(rows: Tensor, order: Tensor, count: int) -> Tensor:
    """[P, count or fewer, d]: rows [P, N, d] of the first places in an order [P, N]."""
    first = order.argsort(1)[:, :count]
    return rows.gather(1, first[..., None].expand(-1, -1, rows.shape[2]))
