"""Attention of a draft that is unrolled over its own outputs, as training-time test needs it.

The query of row t at step k sees the step-0 keys of rows 0 .. t of its document and, of each later step 1 .. k, only its own row's key,
all under one softmax. So it costs one attention over rows and k products a row, whose results are merged by their log-sum-exp.

Shapes: B sequences, T rows, N queries, h heads, g heads of keys and values, D of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def segments(documents: Tensor) -> Tensor:
    """Number of the run of equal documents that each token of [B, T] is in, [B, T], int64; no two sequences share one."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts.flatten().cumsum(0).view_as(documents)


def _diagonals(q: Tensor, later: Sequence[tuple[Tensor, Tensor]], share: int) -> Tensor:
    """Scores [B, h, N, k], in at least fp32, of each query with its own row's keys [B, g, N, D] of k later steps."""
    of = torch.promote_types(q.dtype, torch.float32)
    each = [(q.unflatten(1, (-1, share)) * k[:, :, None]).sum(-1, dtype=of).flatten(1, 2) for k, _ in later]
    return torch.stack(each, -1) * q.shape[-1] ** -0.5


class Plain:
    """Document by document with all scores in memory, for CPUs; one sequence only.

    Args:
        segments: [1, T].
    """

    def __init__(self, segments: Tensor) -> None:
        (segment,) = segments
        self._rows = torch.arange(len(segment))
        changes = (segment.diff() != 0).nonzero()[:, 0] + 1
        self._bounds = [0, *changes.tolist(), len(segment)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, later: Sequence[tuple[Tensor, Tensor]], rows: Tensor | None = None) -> Tensor:
        """[1, h, N, D].

        Args:
            q: [1, h, N, D].
            k, v: [1, g, T, D], of step 0.
            later: keys and values [1, g, N, D] of the steps after it.
            rows: [N], ascending: the row of each query; None: all.
        """
        rows, share = self._rows if rows is None else rows, q.shape[1] // k.shape[1]
        ends = torch.searchsorted(rows, torch.tensor(self._bounds)).tolist()
        parts = [q[:, :, :0]]
        for start, stop, low, high in zip(self._bounds, self._bounds[1:], ends, ends[1:], strict=False):
            if low == high:
                continue
            keys, values = k[:, :, None, start:stop], v[:, :, None, start:stop]
            mine = q[:, :, low:high]
            scores = (mine.unflatten(1, (-1, share)) @ keys.transpose(-1, -2)).flatten(1, 2) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(rows[low:high, None] < self._rows[start:stop], -torch.inf)
            own = [(a[:, :, low:high], b[:, :, low:high]) for a, b in later]
            if own:
                scores = torch.cat((scores, _diagonals(mine, own, share).to(scores.dtype)), -1)
            p = scores.softmax(-1).unflatten(1, (-1, share))
            out = p[..., : stop - start] @ values
            for i, (_, b) in enumerate(own):
                out = out + p[..., stop - start + i, None] * b[:, :, None]
            parts.append(out.flatten(1, 2))
        return torch.cat(parts, 2)


class Flex:
    """By flex_attention, which skips blocks of keys that no query sees, for GPUs.

    Args:
        segments: [B, T].
        compiled: as it is to run; else slowly, for tests.
    """

    def __init__(self, segments: Tensor, compiled: bool = True) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (segments[batch, query] == segments[batch, key]) & (query >= key)

        (batch, rows), self._compiled = segments.shape, compiled
        self._mask = create_block_mask(seen, batch, None, rows, rows, device=segments.device, _compile=compiled)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, later: Sequence[tuple[Tensor, Tensor]], rows: Tensor | None = None) -> Tensor:
        """[B, h, T, D], as `Plain` gives them; all rows are queries."""
        from torch.nn.attention.flex_attention import AuxRequest

        assert rows is None
        out, aux = _flex(self._compiled)(q, k, v, block_mask=self._mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return merged(out, aux.lse, q, later)


def merged(out: Tensor, lse: Tensor, q: Tensor, later: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over what was attended to and each row's keys of later steps.

    Args:
        out: [B, h, T, D], over the keys of step 0.
        lse: [B, h, T], log of the sum of the exponentials of its scores, with gradient.
    """
    if not later:
        return out
    share = q.shape[1] // later[0][0].shape[1]
    weights = torch.cat((lse[..., None], _diagonals(q, later, share)), -1).softmax(-1).to(out.dtype)
    out = out * weights[..., :1]
    for i, (_, value) in enumerate(later):
        weight = weights[..., i + 1 : i + 2].unflatten(1, (-1, share))
        out = out + (weight * value[:, :, None]).flatten(1, 2)
    return out


@lru_cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    found: Any = torch.compile(flex_attention) if compiled else flex_attention
    return found  # type: ignore[no-any-return]
