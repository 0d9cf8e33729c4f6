"""A block draft as decoding uses it.

Shapes: B rows of the batch, K proposed tokens, W confirmed positions, L layers of the draft, S slots of the cache, R rows of a block,
h heads, g heads of keys and values, D of a head, H hidden, Vd the draft's vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from angelslim_core.errors import UsageError

from ..attention import Visible
from ..drafts.layers import vocabulary_ids
from ..kernels import layer as kernels
from ..kernels.verify_attention import VERIFY_ATTENTION
from ..verification.draws import draw
from .base import Drafter, Proposal, Warp
from .joined import JoinedLayer

if TYPE_CHECKING:
    from ..drafts.base import Heads
    from ..drafts.block import BlockDraft


class BlockDrafter(Drafter):
    """Keeps keys and values of confirmed positions only: a block's rows lie beyond them, where the next positions overwrite them.

    Some weights are joined when it is made, so that a draft that was trained further needs a new one.
    """

    graphable = True

    def __init__(self, draft: BlockDraft, heads: Heads) -> None:
        self.draft, self.heads = draft, heads
        self.layer_ids = draft.config.aux_hidden_state_layer_ids
        self.warp = Warp()
        parts: list[Any] = list(draft.layers)
        # what each layer's output goes through: the norm that the next one begins with, or the last
        self.norms = [*(layer.input_layernorm for layer in parts[1:]), draft.norm]
        with torch.no_grad():
            projections, norms = draft.context_weights()
            self.weights = projections.contiguous(), norms
            self.layers = [JoinedLayer(layer.self_attn, layer.post_attention_layernorm, layer.mlp) for layer in parts]
            self.head = draft.head(heads).to(self.weights[0].dtype)
            self.columns = vocabulary_ids(draft)
        self.lengths = self.last = self.keys = self.values = torch.empty(0)
        self.turns = self.keys, self.keys
        self.rooms: dict[Any, Any] = {}

    @torch.no_grad()
    def start(self, prompts: Tensor, lengths: Tensor, capacity: int, warp: Warp) -> None:
        config, rows = self.draft.config, len(prompts)
        self.warp = warp
        # what is written beyond the capacity is never read
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity + config.block_size, config.head_dim)
        if self.keys.shape == shape:  # graphs go on with the same memory
            self.lengths.zero_()
            return
        self.keys, self.values = (torch.zeros(shape, dtype=self.head.dtype, device=self.head.device) for _ in range(2))
        self.lengths, self.last = (torch.zeros(rows, dtype=torch.int64, device=self.head.device) for _ in range(2))
        cos, sin = self.draft.rope(torch.arange(shape[3], device=self.head.device)[None])
        self.turns = cos[0, 0].to(self.head.dtype), sin[0, 0].to(self.head.dtype)

    @torch.no_grad()
    def observe(self, tokens: Tensor, aux: Tensor | None, counts: Tensor) -> None:
        assert aux is not None
        places = self.lengths[:, None] + torch.arange(tokens.shape[1], device=self.lengths.device)
        places = places.clamp(max=self.keys.shape[3] - 1)  # of padding, which is never read
        cos, sin = (functional.embedding(places, turn)[:, None] for turn in self.turns)
        for cache, made in zip((self.keys, self.values), self.draft.context(aux, (cos, sin), self.weights), strict=True):
            cache.scatter_(-2, places[:, None, :, None].expand(made.shape), made)
        final = tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        self.last.copy_(torch.where(counts > 0, final, self.last))
        self.lengths.add_(counts)

    def size(self, k: int) -> int:
        """As `Drafter.size`.

        Raises:
            UsageError: a block has fewer tokens.
        """
        most = self.draft.config.num_tokens
        if k > most:
            raise UsageError(722, "k", f"a block of this draft has {most} tokens, {k} are asked for", f"{most} or fewer")
        return k

    @torch.no_grad()
    def propose(self, k: int, uniforms: Tensor | None = None) -> Proposal:
        config = self.draft.config
        assert 1 <= k <= config.num_tokens
        hidden = self._hidden()[:, -config.num_tokens :][:, :k]
        logits = None if self.draft.corrects else functional.linear(hidden, self.head)
        if logits is not None and not self.draft.biases:
            tokens, q, sure = self._choose(logits, uniforms)
        else:
            tokens, q, sure = self._in_turn(hidden, logits, uniforms)
        before = torch.cat((self.last[:, None], tokens[:, :-1]), 1)
        trained = self.draft.confidence(hidden, before)
        return Proposal(tokens, q, None if q is None else self.columns, confidence=sure if trained is None else trained.float().sigmoid())

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths, self.last = self.lengths[rows], self.last[rows]

    def _hidden(self) -> Tensor:
        """[B, R, H] of the block that follows each row's last token."""
        config = self.draft.config
        ids = torch.cat((self.last[:, None], self.last.new_full((len(self.last), config.block_size - 1), config.mask_token_id)), 1)
        ends = self.lengths + config.block_size
        # the host may look at lengths where there is no device to wait for
        bound = int(ends.max()) if ends.device.type == "cpu" else self.keys.shape[3]
        everything = ends.new_ones(1, 1, 1, dtype=torch.bool).expand(len(ends), config.block_size, config.block_size)
        visible = Visible(self.lengths, torch.arange(config.block_size, device=ends.device), everything, rooms=self.rooms)
        hidden = self.heads.embed(ids).to(self.head.dtype)
        first: Any = self.draft.layers[0]
        read = first.input_layernorm(hidden)
        for layer, norm, keys, values in zip(self.layers, self.norms, self.keys, self.values, strict=True):
            q = kernels.TURN_AND_STORE(*layer.project(read), *self.turns, keys, values, self.lengths, norms=layer.head_norms)
            found = VERIFY_ATTENTION(q, keys[:, :, :bound], values[:, :, :bound], visible, q.shape[3] ** -0.5)
            hidden, read = layer.finish(found, hidden, norm)
        return read

    def _in_turn(self, hidden: Tensor, logits: Tensor | None, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Slots one after another, each knowing the token before it."""
        before, found = self.last, []
        for slot in range(hidden.shape[1]):
            if logits is None:
                scores = functional.linear(self.draft.corrected(hidden[:, slot], self.heads.embed(before).to(hidden.dtype)), self.head)
            else:
                scores = logits[:, slot]
            if self.draft.biases:
                scores = scores + self.draft.bias(before)
            ids, q, sure = self._choose(scores[:, None], None if uniforms is None else uniforms[:, slot : slot + 1])
            before = ids[:, 0]
            found.append((ids, q, sure))
        q = None if uniforms is None else torch.cat([drawn for _, drawn, _ in found if drawn is not None], 1)
        return torch.cat([ids for ids, _, _ in found], 1), q, torch.cat([sure for _, _, sure in found], 1)

    def _choose(self, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens [B, K], what they were drawn from [B, K, Vd], and their probabilities [B, K], of logits [B, K, Vd]."""
        if uniforms is None:
            tokens, sure = kernels.CHOOSE(logits.flatten(0, -2), self.columns)
            return tokens.view(logits.shape[:-1]), None, sure.view(logits.shape[:-1])
        q = self.warp(logits)
        chosen = draw(q, uniforms)
        sure = q.gather(-1, chosen[..., None])[..., 0]
        return chosen if self.columns is None else self.columns[chosen], q, sure
