"""Drafts that propose a token at a time, each from their own output for the one before: a chain, or a tree of the best.

Shapes: B rows of the batch, K proposed tokens, W confirmed positions, H hidden, Vd draft vocabulary, k children of a node and nodes
of a level that go on, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ..drafts.layers import MLP, RMSNorm, vocabulary_ids
from ..kernels import layer as kernels
from ..kernels.tree import CHOOSE_TREE, EXPAND, Candidates, Front
from ..verification.draws import draw
from .base import Drafter, Proposal, Warp
from .draft_cache import DraftCache
from .joined import JoinedLayer

if TYPE_CHECKING:
    from ..drafts.base import Heads
    from ..drafts.stepwise import Stepwise


@dataclass(frozen=True)
class Tree:
    """Shape of a dynamic tree.

    Args:
        depth: levels at most.
        top_k: children of a node, and nodes of a level that get children.
        total: tokens to verify at most, those of the greatest probability.

    Source: EAGLE-2, arXiv:2406.16858.
    """

    depth: int = 5
    top_k: int = 8
    total: int = 32

    def __post_init__(self) -> None:
        assert min(self.depth, self.top_k, self.total) >= 1

    def candidates(self, levels: int) -> int:
        """C of so many levels."""
        return self.top_k + (min(levels, self.depth) - 1) * self.top_k**2


class Autoregressive(Drafter):
    """Confirmed positions are run once, with the target's features; only the last one goes through attention and head, to propose from.

    Some weights are joined when it is made, so that a draft that was trained further needs a new one.

    Args:
        tree: what to propose instead of a chain.
        static: shapes never depend on lengths; None: on GPUs.
    """

    graphable = True

    def __init__(self, draft: Stepwise, heads: Heads, tree: Tree | None = None, *, static: bool | None = None) -> None:
        self.draft, self.heads, self.tree, self.warp = draft, heads, tree, Warp()
        self.layer_ids = tuple(draft.config.aux_hidden_state_layer_ids)
        norm, mlp = draft.layer["post_attention_layernorm"], draft.layer["mlp"]
        assert isinstance(norm, RMSNorm) and isinstance(mlp, MLP)
        self._layer = JoinedLayer(draft.attention, norm, mlp)
        weight = self._layer.projections
        with torch.no_grad():
            self._head, self._columns = draft.head_weight(heads).detach().to(weight.dtype), vocabulary_ids(draft)
        if tree is not None:
            assert tree.top_k <= len(self._head)
        self._static = weight.device.type != "cpu" if static is None else static
        self._cache: DraftCache | None = None
        # what the last confirmed position put out: for the next step, and for the head; cosine and sine of each position
        self._carried = self._read = weight[:0]
        self._turns = self._carried, self._carried

    @torch.no_grad()
    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        config, like = self.draft.config, self._layer.projections
        self.warp = warp
        room = capacity + (0 if self.tree is None else (self.tree.depth - 1) * self.tree.top_k)
        shape = (len(prompts), config.num_key_value_heads, room + 1, config.head_dim)
        if self._cache is not None and self._cache.shape == shape:  # graphs go on with the same memory
            self._cache.clear()
            return
        self._cache = DraftCache(len(prompts), config.num_key_value_heads, room, config.head_dim, like, static=self._static)
        self._carried, self._read = (like.new_zeros(len(prompts), 1, config.hidden_size) for _ in range(2))
        cos, sin = self.draft.rope(torch.arange(room + 1, device=like.device)[None])
        self._turns = cos[0, 0].to(like.dtype), sin[0, 0].to(like.dtype)

    @torch.no_grad()
    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        assert aux is not None and self._cache is not None
        cache = self._cache
        residual, x = self._mixed(tokens, self.draft.features(aux))
        q = cache.take(*self._layer.project(x), self._turns, 0)
        cache.confirm(counts)
        last = (counts - 1).clamp(min=0)[:, None, None]
        residual = residual.gather(1, last.expand(-1, -1, residual.shape[2]))
        q = q.gather(2, last[:, None].expand(-1, q.shape[1], -1, q.shape[3]))
        some = (counts > 0)[:, None, None]
        for kept, new in zip((self._carried, self._read), self._attended(residual, q, 0), strict=True):
            torch.where(some, new, kept, out=kept)

    @torch.no_grad()
    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        return self._chain(k, uniforms) if self.tree is None else self._grow(self.tree, k)

    def size(self, k: int) -> int:
        return k if self.tree is None else min(self.tree.total, self.tree.candidates(k))

    def keep(self, rows: Tensor) -> None:
        assert self._cache is not None
        self._cache.keep(rows)
        self._carried, self._read = self._carried[rows], self._read[rows]

    def _chain(self, k: int, uniforms: Tensor | None) -> Proposal:
        carried, read = self._carried, self._read
        tokens: list[Tensor] = []
        drawn: list[Tensor] = []
        sure: list[Tensor] = []
        for i in range(k):
            if i:
                carried, read = self._step(tokens[-1][:, None], carried, i, i - 1, None)
            logits = functional.linear(read[:, 0], self._head)
            if uniforms is None:
                token, chance = kernels.CHOOSE(logits, self._columns)
            else:
                q = self.warp(logits)
                chosen = draw(q, uniforms[:, i])
                drawn.append(q)
                token, chance = self._ids(chosen), q.gather(-1, chosen[:, None])[:, 0]
            tokens.append(token)
            sure.append(chance)
        chances = torch.stack(drawn, 1) if drawn else None
        return Proposal(torch.stack(tokens, 1), chances, self._columns if drawn else None, confidence=torch.stack(sure, 1))

    def _grow(self, tree: Tree, levels: int) -> Proposal:
        carried, read, width, depth = self._carried, self._read, tree.top_k, min(levels, tree.depth)
        found = Candidates.room(len(carried), tree.candidates(levels), carried.device)
        front: Front | None = None
        base = 0
        for level in range(depth):
            if front is not None:
                carried = carried.gather(1, front.origin[..., None].expand(-1, -1, carried.shape[2]))
                carried, read = self._step(front.tokens, carried, level, (level - 1) * width, front.visible)
            logits = functional.linear(read, self._head)
            front = EXPAND(logits, self._columns, front, found, base, width, level == depth - 1)
            base += logits.shape[1] * width
        tokens, parents, sure = CHOOSE_TREE(found, self.size(levels))
        return Proposal(tokens, parents=parents, confidence=sure)

    def _step(self, tokens: Tensor, carried: Tensor, ahead: int, offset: int, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step for tokens [B, T] `ahead` of the last confirmed position, kept at `offset` behind it.

        Args:
            visible: [B, T, offset + T], bool: which of the steps' own positions each sees; None: all.
        """
        assert self._cache is not None
        cache, count = self._cache, tokens.shape[1]
        residual, x = self._mixed(tokens, carried)
        q = cache.take(*self._layer.project(x), self._turns, offset, ahead - 1)
        return self._attended(residual, q, offset + count, visible)

    def _attended(self, residual: Tensor, q: Tensor, ahead: int, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert self._cache is not None
        hidden, read = self._layer.finish(self._cache.attend(q, ahead, visible), residual, self.draft.norm)
        return read if self.draft.feeds_normed else hidden, read

    def _mixed(self, tokens: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        of_embedding, of_carried = self.draft.norms
        weights = self.heads.embedding, self.heads.scale, of_embedding.weight, of_carried.weight
        return self.draft.mixed(kernels.EMBED_NORMS(tokens, carried, *weights, of_embedding.eps), carried)

    def _ids(self, chosen: Tensor) -> Tensor:
        return chosen if self._columns is None else self._columns[chosen]
