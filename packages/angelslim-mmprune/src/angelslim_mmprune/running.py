"""What the coupling knows of the forward pass at hand. Shapes: B rows, T keys, d width of a statistic."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .budget import Scope
    from .capture import EncoderCall, LanguageCapture
    from .layout import Item, Pools
    from .plan import Need
    from .sequence import State, Tokens
    from .strategies.base import Modality


@dataclass
class Running:
    """One forward pass: its media, what was captured, and what is left of its tokens.

    Args:
        told: sizes of the first kind of media.
        calls: of the encoder.
        encoded: [T] or [T, d], of all tokens that the encoder made.
        text: of each row, columns of the tokens that are of no medium.
        fresh: nothing was pruned in the cache before.
        next: [B], position behind the furthest of all tokens.
        cache: as the layers see it.
        group: number of the group of layers that the pass is at; they see the same tokens.
        masks: of each group so far, [B, T], bool: which keys are real.
        padded: of each group so far: whether there are any that are not.
        causal: the group's mask, as attention takes it.
        rotations: the group's cosines and sines.
    """

    stack: ExitStack = field(default_factory=ExitStack)
    told: Any = None
    items: list[Item] = field(default_factory=list)
    pools: dict[tuple[Scope, frozenset[Modality]], Pools] = field(default_factory=dict)
    calls: list[EncoderCall] = field(default_factory=list)
    encoded: dict[Need, Tensor] = field(default_factory=dict)
    language: LanguageCapture | None = None
    text: list[Tensor] = field(default_factory=list)
    prunes: bool = False
    fresh: bool = True
    state: State | None = None
    next: Tensor | None = None
    cache: Any = None
    tokens: Tokens | None = None
    group: int = 0
    masks: list[Tensor] = field(default_factory=list)
    padded: list[bool] = field(default_factory=list)
    causal: Any = None
    rotations: tuple[Tensor, ...] = ()

    def rows(self) -> tuple[list[int], Tensor | None]:
        """Of each row the real tokens, which are the last, and which keys before them are real, [B, T]."""
        assert self.tokens is not None and self.state is not None
        before = self.state.masks[self.group]
        return self.tokens.lengths, before if before.shape[1] else None

    def extend(self) -> None:
        """The mask of the group that the pass is at, with what is left of its tokens."""
        assert self.tokens is not None and self.state is not None
        self.masks.append(torch.cat([self.state.masks[self.group], self.tokens.real], 1))
        self.padded.append(self.state.padded[self.group] or self.tokens.padded)
