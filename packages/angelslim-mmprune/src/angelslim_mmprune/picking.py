"""What strategies that pick tokens share: cosines, orders, exact counts, and one check of the numbers.

Shapes: P pools, N tokens of the largest, K kept ones of the one that keeps most, D width. Nothing here waits for a device but `check_finite`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dpp import ascending
from .finite import all_finite, require
from .plan import Need, Pool, Statistic, of_host

# tokens up to which all cosines of a pool are held: 64 MiB of FP32 a pool
GRAM_TOKENS = 4096
# what an option `layer` says of itself
LAYER_MEANING = "layer of the encoder whose attention counts; none given: the one whose output the projector gets, the last but one of LLaVA's, else the last"


def check_finite(pool: Pool, *statistics: Tensor) -> None:
    """Look once, after all work was handed to the device, whether features and statistics [P, N] or [P, N, D] were numbers.

    Raises:
        NotFiniteError: they were not, where there are tokens.
    """
    require(all_finite(pool.valid, pool.features, *statistics), 850, "tokens")


def of_layer(layer: int | None, statistic: Statistic) -> Need:
    """What an option `layer` asks for."""
    return Need("encoder", "features" if layer is None else layer, statistic)


def numbers(values: Sequence[int], pool: Pool) -> Tensor:
    """[P], int64, of a number of each pool that the host knows."""
    return of_host(values, pool.features.device)


def unit(values: Tensor, valid: Tensor) -> Tensor:
    """[P, N, D] as FP32 rows of length 1; rows that are 0 stay so, and so become those that are no tokens."""
    return torch.nn.functional.normalize(values.float().masked_fill(~valid[..., None], 0), dim=-1)


class Cosines:
    """Cosines between the tokens of each pool, held up to GRAM_TOKENS of them and else computed as asked for.

    Args:
        rows: [P, N, D], of length 1.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._all = rows @ rows.mT if rows.shape[1] <= GRAM_TOKENS else None
        self._pools = torch.arange(len(rows), device=rows.device)

    def of(self, token: Tensor) -> Tensor:
        """[P, N]: to one token [P] of each pool."""
        if self._all is not None:
            return self._all[self._pools, token]
        return (self.rows @ self.rows[self._pools, token][..., None])[..., 0]

    def between(self, these: Tensor, those: Tensor) -> Tensor:
        """[P, A, B] between tokens [P, A] and [P, B]."""
        pools = self._pools[:, None]
        if self._all is not None:
            return self._all[pools[..., None], these[:, :, None], those[:, None]]
        return self.rows[pools, these] @ self.rows[pools, those].mT

    def nearest(self, valid: Tensor, block: int = 1024) -> Tensor:
        """[P, N]: of each token, the cosine to the token nearest to it, itself left out; -1 where there is no other."""
        tokens = self.rows.shape[1]
        found = []
        for start in range(0, tokens, block):
            stop = min(tokens, start + block)
            part = self.rows[:, start:stop] @ self.rows.mT if self._all is None else self._all[:, start:stop]
            cosines = part.masked_fill(~valid[:, None], -1)
            cosines.diagonal(start, 1, 2).fill_(-1)
            found.append(cosines.amax(-1))
        return torch.cat(found, 1)


def ranks(scores: Tensor, valid: Tensor) -> Tensor:
    """[P, N], int64: the place of each token, the largest score first, equal ones by number, behind all what is no token."""
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def kept(chosen: Tensor, keep: Sequence[int]) -> Tensor:
    """A plan's `keep` of bool [P, N] that holds exactly `keep` tokens of each pool."""
    tokens = chosen.shape[1]
    places = torch.arange(tokens, device=chosen.device)
    return ascending(torch.where(chosen, places, -1), tokens)[:, : max(keep, default=0)]
