"""What proposes tokens while decoding.

Shapes: B rows of the batch, K proposed tokens, W confirmed positions, n H features, V vocabulary, Vd columns of q.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Proposal:
    """Tokens to verify.

    Args:
        tokens: [B, K], int64, ids of the target.
        q: [B, K, Vd], fp32, the probabilities each token was drawn from; None: each is a point mass (argmax, lookup).
        columns: [Vd], int64, the target's id of each column of q; None: all V in order.
        parents: [B, K], int64, which proposed token each follows, -1 the last confirmed one; parents come first. None: a chain.
        confidence: [B, K], fp32, the draft's probability of each token; None: it has none.
        counts: [B], int64, how many tokens of a row are real, the rest being padding; None: all.
    """

    tokens: Tensor
    q: Tensor | None = None
    columns: Tensor | None = None
    parents: Tensor | None = None
    confidence: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True)
class Warp:
    """How logits become probabilities, at the target as at the draft.

    Args:
        temperature: 0 is greedy.
        top_k: 0 is all.
        top_p: 1 is all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Probabilities [..., V], fp32, of logits [..., V]; greedy is refused, being no distribution."""
        assert self.temperature > 0
        scaled = logits.float() / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k, -1).values[..., -1:], -torch.inf)
        p = scaled.softmax(-1)
        if self.top_p < 1:
            ranked, order = p.sort(-1, descending=True)
            kept = ranked.cumsum(-1) - ranked < self.top_p  # the first always stays
            p = torch.zeros_like(p).scatter_(-1, order, ranked * kept)
            p = p / p.sum(-1, keepdim=True)
        return p


class Drafter(ABC):
    """Proposes tokens for each row of a batch.

    Attributes:
        layer_ids: layers of the target whose outputs `observe` needs.
        graphable: `observe` and `propose` are device work of fixed shape without host sync, on storage that `start` keeps where
            it is while shapes stay the same, so that CUDA graphs can hold them.
        reads_host: `observe` reads tokens on the host; they come as CPU tensors.
    """

    layer_ids: tuple[int, ...] = ()
    graphable: bool = False
    reads_host: bool = False

    @abstractmethod
    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        """Begin a batch.

        Args:
            prompts: [B, P], int64, left-aligned.
            lengths: [B], int64.
            capacity: positions a row may come to have, proposals included.
            warp: how the draft's logits become probabilities when it samples.
        """

    @abstractmethod
    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        """Positions that are now certain, after those observed before.

        Position t comes with the token that follows it and with the target's features of t itself: at the prompt's end
        tokens are x_1 .. x_P, x_P the first one generated, and aux those of positions 0 .. P-1.

        Args:
            tokens: [B, W], int64.
            aux: [B, W, n H], or None where `layer_ids` is empty.
            counts: [B], int64: how many of the W are real; the rest holds anything.
        """

    @abstractmethod
    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        """Up to k tokens a row that may follow the last one observed.

        Args:
            k: tokens of a chain, levels of a tree.
            uniforms: [B, k], fp32 in [0, 1), to draw with; None: the most probable.
        """

    def size(self, k: int) -> int:
        """Tokens a row that `propose(k)` gives: more than k where they are a tree."""
        return k

    def keep(self, rows: Tensor) -> None:
        """Of the batch's rows these go on, in this order: [B'], int64. Only where the engine shrinks batches."""
        raise NotImplementedError(f"{type(self).__name__} keeps all rows of a batch")
