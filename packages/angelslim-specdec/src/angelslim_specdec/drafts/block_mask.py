"""Which blocks of a text a block draft is trained on, and what their rows see.

Shapes: B sequences, T tokens, A blocks a sequence, R = A * size rows of blocks, h heads, g heads of keys and values, D of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Batch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def choose_anchors(batch: Batch, count: int, room: int) -> tuple[Tensor, Tensor]:
    """Where blocks start: tokens of answers, followed by another and by `room` tokens of the same document in all, drawn evenly.

    Draws with torch's generator of the batch's device.

    Returns:
        anchors [B, A], int64, ascending, and which of them are real [B, A], bool, A being the lesser of count and T.
    """
    length = batch.ids.shape[1]
    if room >= length:
        fits = torch.zeros_like(batch.loss_mask)
    else:
        fits = functional.pad(batch.documents[:, room:] == batch.documents[:, :-room], (0, room))
        fits &= batch.loss_mask & functional.pad(batch.loss_mask[:, 1:], (0, 1)) & (batch.documents >= 0)
    drawn = torch.rand(fits.shape, device=fits.device).masked_fill(~fits, -1.0).topk(min(count, length), sorted=False)
    # side by side in order, blocks share tiles of keys; those that are not real come last
    places, order = drawn.indices.masked_fill(drawn.values < 0, length).sort(-1)
    return places.clamp(max=length - 1), (drawn.values >= 0).gather(1, order)


@dataclass(frozen=True)
class Sight:
    """What rows of blocks see among the T tokens before the blocks and, after these, all R rows.

    A row sees the tokens of its document that come before its anchor, whose own features are not known when decoding, and all of its
    own block. Rows of blocks that are not kept see nothing.

    Args:
        anchors: [B, A], int64.
        kept: [B, A], bool.
        documents: [B, T], int64.
        size: rows of a block.
    """

    anchors: Tensor
    kept: Tensor
    documents: Tensor
    size: int

    def rule(self) -> Rule:
        """Whether (sequence, head, row, key) see, of indices that broadcast."""
        anchors, kept, documents, size, length = self.anchors, self.kept, self.documents, self.size, self.documents.shape[1]
        owners = documents.gather(1, anchors)

        def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            block = row // size
            before = (key < anchors[b, block]) & (documents[b, key.clamp(max=length - 1)] == owners[b, block])
            own = (key >= length) & ((key - length) // size == block)
            return kept[b, block] & (before | own)

        return sees

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, R and T + R."""
        (batch, blocks), length = self.anchors.shape, self.documents.shape[1]
        return batch, blocks * self.size, length + blocks * self.size

    def dense(self) -> Tensor:
        """[B, R, T + R], bool."""
        b, row, key = (torch.arange(size, device=self.anchors.device) for size in self.shape)
        return self.rule()(b[:, None, None], torch.zeros_like(b[:1]), row[None, :, None], key[None, None])

    def flex(self) -> BlockMask:
        """The same for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        batch, rows, keys = self.shape
        device = self.anchors.device
        make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        return make(self.rule(), batch, None, rows, keys, device=str(device))


def attention(sight: Sight) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of q [B, h, R, D] over k and v [B, g, T + R, D]: FlexAttention on GPUs, elsewhere a dense mask."""
    if sight.anchors.device.type == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        mask = sight.flex()
        return lambda q, k, v: _compiled(flex_attention)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    dense = sight.dense()[:, None]
    return lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, dense, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function)
