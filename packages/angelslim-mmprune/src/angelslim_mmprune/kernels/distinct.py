"""Tokens without near copies: VisPruner's rounds, in which every other token is held against those between.

Shapes: P pools, N tokens of the largest, R of them that are to choose among, D width. `counts` and `wanted` are known to the host, and so is how many
go in which round; nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..picking import Cosines, ranks, unit
from ..plan import before, of_host
from .greedy import on_cpu
from .mmr import GRAM_BYTES

# tokens of which a program holds every other
MOST = 16384


def rounds(counts: Sequence[int], wanted: Sequence[int], step: int) -> list[list[int]]:
    """Of each round, how many tokens of each pool go; pools that are to keep none take no part."""
    left, found = [n if k else 0 for n, k in zip(counts, wanted, strict=True)], []
    while any(n > k for n, k in zip(left, wanted, strict=True)):
        # of two tokens or more at least one goes; one alone is only ever left where one is wanted
        found.append([min(step, n // 2, n - k) for n, k in zip(left, wanted, strict=True)])
        left = [n - gone for n, gone in zip(left, found[-1], strict=True)]
    return found


def reference(features: Tensor, tokens: Tensor, sizes: Sequence[int], counts: Sequence[int], wanted: Sequence[int], step: int) -> Tensor:
    """One pool and one round after the other, in FP64.

    Args:
        features: [P, N, D].
        tokens: [P, R], int64: numbers to choose among, ascending, -1 behind.
        sizes: tokens of each pool; features behind them are not read.
        counts: how many of `tokens` each pool has.
        wanted: how many of these are to stay.
        step: the most that go in a round.

    Returns:
        [P, most of wanted], int64: those that stay, ascending, -1 behind.
    """
    found = torch.full((len(counts), max(wanted, default=0)), -1, device=features.device)
    for p, (size, count, k) in enumerate(zip(sizes, counts, wanted, strict=True)):
        x = torch.nn.functional.normalize(features[p, :size].double(), dim=-1)
        left = tokens[p, :count] if k else tokens[p, :0]
        for (gone,) in rounds([count], [k], step):
            near = (x[left[::2]] @ x[left[1::2]].T).amax(1)
            near = torch.where((near - 1).abs() < 2e-6, 1.0, near)
            goes = near.argsort(descending=True, stable=True)[:gone]
            stays = torch.ones_like(left, dtype=torch.bool)
            stays[2 * goes] = False
            left = left[stays]
        found[p, : len(left)] = left
    return found


def batched(features: Tensor, tokens: Tensor, sizes: Sequence[int], counts: Sequence[int], wanted: Sequence[int], step: int) -> Tensor:
    """As the reference: all pools at a time, in FP32, a few operations a round."""
    none = features.shape[1]
    cosines = Cosines(unit(features, before(of_host(sizes, features.device), none)))
    empty = of_host([not k for k in wanted], tokens.device).bool()
    rest = tokens.masked_fill((tokens < 0) | empty[:, None], none)
    goings = rounds(counts, wanted, step)
    left = [n if k else 0 for n, k in zip(counts, wanted, strict=True)]
    drops = of_host([n for going in goings for n in going], rest.device).view(-1, len(left))  # one copy to the device for all rounds
    for going, drop in zip(goings, drops, strict=True):
        rest = rest[:, : max(left)]
        left = [n - gone for n, gone in zip(left, going, strict=True)]
        these, those = rest[:, ::2], rest[:, 1::2]
        near = cosines.between(these.clamp(max=none - 1), those.clamp(max=none - 1)).masked_fill_((those == none)[:, None], -torch.inf)
        goes = ranks(near.amax(-1), these < none) < drop[:, None]
        rest = torch.cat([these.masked_fill(goes, none), those], 1).sort(1).values
    rest = rest[:, : max(left, default=0)]
    return rest.masked_fill(rest == none, -1)


def _triton(features: Tensor, tokens: Tensor, sizes: Sequence[int], counts: Sequence[int], wanted: Sequence[int], step: int) -> Tensor:
    from .triton.distinct import distinct

    return distinct(features, tokens, sizes, counts, wanted, step)


def _fits(features: Tensor, *_: object) -> tuple[bool, str]:
    import triton

    pools, tokens, _width = features.shape
    if features.dtype == torch.float64 or tokens > MOST or 4 * pools * tokens * (tokens + 15) > GRAM_BYTES:
        return False, f"no FP64, no more than {MOST} tokens, and cosines of no more than {GRAM_BYTES >> 30} GiB"
    return features.is_cuda or bool(triton.knobs.runtime.interpret), "tensors on a GPU, or TRITON_INTERPRET=1 before Triton is imported"


DISTINCT = Kernel(
    "mmprune.distinct",
    reference,
    (Implementation("torch", batched, on_cpu), Implementation("triton", _triton, _fits, triton_runs), Implementation("rounds", batched)),
)
