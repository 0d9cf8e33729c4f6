"""Static rules: masks [Pq, Pk] that follow from positions alone. Numbers of tokens are rounded up to whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .prefill import Prefill


def causal(s: Prefill) -> Tensor:
    """Every block up to the one that holds the row's last position."""
    return s.j <= s.last_P1


def own(s: Prefill) -> Tensor:
    """The blocks that hold the row's own positions."""
    return (s.j >= s.own_ends[0][:, None]) & causal(s)


def sink(s: Prefill, tokens: int) -> Tensor:
    """The first blocks."""
    return (s.j * s.block < tokens).expand(s.rows, -1)


def local(s: Prefill, tokens: int) -> Tensor:
    """As many blocks as hold `tokens`, the row's last own block counted."""
    return s.last_P1 - s.j < -(-tokens // s.block)


def window(s: Prefill, tokens: int) -> Tensor:
    """Every block with a key nearer than `tokens` to the row's first query."""
    return s.start_P1 - (s.j * s.block + s.block - 1) < tokens


def last_rows(s: Prefill, tokens: int) -> Tensor:
    """All blocks for the query blocks that hold the last queries."""
    start = torch.arange(0, s.q_len, s.block, device=s.q.device)[:, None]
    return ((start + s.block).clamp(max=s.q_len) > s.q_len - tokens).expand(-1, s.columns)


def every(s: Prefill, stride: int) -> Tensor:
    """Every `stride`-th block, counted back from the row's last own block."""
    return (s.last_P1 - s.j) % stride == 0
