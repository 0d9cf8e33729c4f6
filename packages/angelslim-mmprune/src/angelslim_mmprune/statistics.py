"""What strategies read of attention: exact, from queries and keys after their rotation, so that the model itself may use fused attention.

Shapes: a piece is one call of attention: q [B, H, n, d], k [B, G, n, d], G a divisor of H. `unit` tokens of an encoder that follow each other become one of
the language model's. Everything is computed and returned in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from angelslim_core.errors import UsageError

from .kernels.received import LSE, RECEIVED, within
from .plan import Statistic


def of_pieces(
    statistic: Statistic, pieces: Sequence[tuple[Tensor, Tensor]], unit: int, cls: bool, scale: float, lengths: Sequence[int] | Tensor | None = None
) -> Tensor:  # fmt: skip
    """A statistic of an encoder's layer.

    Args:
        statistic: `received`: what a key gets from all queries of its piece, heads' mean, a unit's sum. `importance`: where there is a class token, its row over
            the others (heads' mean, a unit's sum), else `received`. `keys`: mean over unit and heads. `pooled_diagonal`: what the queries of a unit give that
            unit itself, means over heads and queries, sum over keys. `pooled_max`: mean over queries of a unit's sum of the highest weight among heads.
        pieces: in the encoder's order, such as windows or images; weights of one sum to 1 within it.
        cls: whether the first token of each piece is a class token, which gets no value of its own.
        scale: that scores are multiplied by: 1 where queries come scaled.
        lengths: of each row, how many of a piece's tokens are not padding; only where there is one piece. Values of padding are 0.

    Returns:
        [B, tokens], pieces one behind the other; [B, tokens, d] for keys. A unit that a length cuts is left out, as pooling leaves it out.

    Raises:
        UsageError: not a statistic of an encoder, or units that do not fit.

    Source: VisionZip (2412.04467) sums columns, as SCOPE's code does; Samp (202606.0741), equations 8 to 10, pools.
    """
    if statistic not in ("received", "importance", "keys", "pooled_diagonal", "pooled_max"):
        raise UsageError(860, "statistic", f"{statistic!r:.40} is none of an encoder's attention")
    if not pieces or (lengths is not None and len(pieces) != 1):
        raise UsageError(
            861, "pieces", f"{len(pieces)} calls of attention{' with lengths' if lengths is not None else ''}", "give one, or more without padding"
        )
    if cls and statistic.startswith("pooled"):
        raise UsageError(862, "statistic", f"{statistic} of an encoder with a class token")
    # of one size, side by side: windows are many and small
    sizes: dict[int, list[int]] = {}
    for number, (q, _) in enumerate(pieces):
        sizes.setdefault(q.shape[2], []).append(number)
    found: dict[int, Tensor] = {}
    for size, numbers in sizes.items():
        if (size - cls) % unit and lengths is None:
            raise UsageError(863, "unit", f"a piece of {size - cls} tokens in units of {unit}")
        q, k = (torch.cat([pieces[i][side] for i in numbers]) if len(numbers) > 1 else pieces[numbers[0]][side] for side in (0, 1))
        span = None if lengths is None else _span(lengths, q.device)
        value = _of_piece(statistic, q, k, unit, cls, scale, span)
        found.update(zip(numbers, value.chunk(len(numbers)), strict=True))
    return torch.cat([found[i] for i in range(len(pieces))], 1)


def of_llm(statistic: Statistic, q: Tensor, k: Tensor, scale: float, lengths: Sequence[int] | Tensor | None = None, left: bool = True) -> Tensor:
    """A statistic of a layer of a language model, whose attention is causal.

    Args:
        statistic: `last_row`: what the last query of each row gives the keys, heads' mean. `received`: as in `of_pieces`. `raw_keys`: all heads of a key.
        q: [B, H, T, d], of the last T of N places.
        k: [B, G, N, d].
        lengths: of each row, how many of the N places are not padding.
        left: whether padding stands before them.

    Returns:
        [B, N]; [B, N, G d] for raw keys, in k's dtype. Values of padding are 0.

    Raises:
        UsageError: not a statistic of a language model.
    """
    keys = k.shape[2]
    span = None
    if lengths is not None:
        span = _span(lengths, q.device)
        span = keys - span.flip(1) if left else span
    if statistic == "raw_keys":
        raw = k.transpose(1, 2).flatten(2)
        return raw if span is None else _cleared(raw, span)
    if statistic == "received":
        received: Tensor = RECEIVED(q, k, scale, span, None, True)
        return received
    if statistic != "last_row":
        raise UsageError(864, "statistic", f"{statistic!r:.40} is none of a language model's attention")
    if span is None:
        return _row(q[:, :, -1:], k, scale)
    last = (span[:, 1] - 1 - (keys - q.shape[2])).clamp(min=0)
    query = q.gather(2, last[:, None, None, None].expand(-1, q.shape[1], -1, q.shape[3]))
    return _row(query, k, scale, span)


def _of_piece(statistic: Statistic, q: Tensor, k: Tensor, unit: int, cls: bool, scale: float, span: Tensor | None) -> Tensor:
    """[B, tokens(, d)] of pieces side by side."""
    tokens = (q.shape[2] - cls) // unit
    whole = None  # places of tokens whose units are whole, and with a class token counted behind it
    if span is not None:
        whole = torch.stack([span[:, 0], ((span[:, 1] - int(cls)) // unit).clamp(min=0)], 1)
    value: Tensor
    if statistic == "keys":
        value = k[:, :, cls:].float().mean(1)[:, : tokens * unit].unflatten(1, (tokens, unit)).mean(2)
    elif statistic == "pooled_diagonal":
        value = _diagonal(q, k, LSE(q, k, scale, span), tokens, unit, scale)
    elif statistic == "pooled_max":
        end = tokens * unit
        asking = torch.tensor([[0, end]], device=q.device).repeat(q.shape[0], 1) if whole is None else whole * unit
        value = RECEIVED(q, k, scale, span, asking, False, True)[:, :end].unflatten(1, (tokens, unit)).sum(2)
        value = value / (asking[:, 1:].clamp(min=1))
    else:
        if statistic == "importance" and cls:
            value = _row(q[:, :, :1], k[:, :, 1:], scale, None if span is None else (span - 1).clamp(min=0))
        else:
            value = RECEIVED(q, k, scale, span)[:, cls:]
        value = value[:, : tokens * unit].unflatten(1, (tokens, unit)).sum(2)
    return value if whole is None else _cleared(value, whole)


def _diagonal(q: Tensor, k: Tensor, lse: Tensor, tokens: int, unit: int, scale: float) -> Tensor:
    """[B, tokens]: exp(q.k scale - lse) within units of `unit`, means over heads and queries, sum over keys."""
    batch, heads, _, width = q.shape
    own = k[:, :, : tokens * unit].float().reshape(batch, k.shape[1], 1, tokens, unit, width)
    asked = q[:, :, : tokens * unit].float().reshape(batch, k.shape[1], -1, tokens, unit, width)
    scores = (asked @ own.transpose(-1, -2)).reshape(batch, heads, tokens, unit, unit)
    weights = (scores * scale - lse[:, :, : tokens * unit].reshape(batch, heads, tokens, unit, 1)).exp()
    return weights.sum(4).mean((1, 3))


def _row(q: Tensor, k: Tensor, scale: float, span: Tensor | None = None) -> Tensor:
    """[B, N]: heads' mean of the softmax of one query a row, q [B, H, 1, d]."""
    batch, heads, _, width = q.shape
    scores = (q.float().reshape(batch, k.shape[1], -1, width) @ k.float().transpose(2, 3)).reshape(batch, heads, -1) * scale
    if span is None:
        return scores.softmax(-1).mean(1)
    scores = scores.masked_fill(~within(span, 0, k.shape[2])[:, None], -torch.inf)
    return _cleared(scores.softmax(-1).mean(1), span)


def _span(lengths: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """[B, 2]: from the first place on so many."""
    counts = torch.as_tensor(lengths, dtype=torch.int64).to(device, non_blocking=True)
    return torch.stack([torch.zeros_like(counts), counts], 1)


def _cleared(value: Tensor, span: Tensor) -> Tensor:
    """Values [B, N(, d)], 0 outside spans."""
    inside = within(span, 0, value.shape[1])
    return torch.where(inside if value.dim() == 2 else inside[..., None], value, 0)
