"""What block drafts share: a block of masks after the last token becomes the next tokens in one forward.

The rows of a block attend to keys and values made of the target's features of all tokens before the block, in each layer anew, and to
each other, both ways. The target's embedding and head are used as they are.

Shapes: B sequences, T tokens, n tapped layers, L layers of the draft, H hidden, h heads, g heads of keys and values, D of a head,
A blocks a sequence, S = block_size rows of a block, K slots of a block that draft a token, V vocabulary, Vd the draft's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional

from angelslim_core.errors import UsageError

from ..kernels.layer import rotate
from ..training.losses import teacher
from .base import Batch, Draft, DraftConfig, Heads, Loss, TargetShape
from .block_loss import Kind, Terms, Weighting, per_slot, terms
from .block_mask import Sight, attention, choose_anchors
from .layers import MLP, Attention, RMSNorm, Rope, add_vocabulary, draft_rope, vocabulary_ids

if TYPE_CHECKING:
    from ..drafters.base import Drafter

# layer, q [B, h, R, D], k and v [B, g, R, D] of the rows of blocks -> [B, h, R, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class BlockConfig(DraftConfig):
    """Shape and training of a block draft."""

    num_hidden_layers: int = Field(5, ge=1, description="layers of the draft")
    block_size: int = Field(16, ge=2, description="rows of a block: the last token, then masks")
    mask_token_id: int = Field(ge=0, description="whose embedding stands for a token to draft")
    sample_from_anchor: bool = Field(False, description="slot s drafts the token after it, so that a block gives block_size tokens; else its own")
    loss: Kind = Field("ce", description="ce: of the text; kl, tv, lk_alpha, lk_hybrid: to the target; ce_tv: .1 ce + 1.8 tv; e2e_tv: of the accepted length")
    weighting: Weighting = Field("decay", description="of slots: decay, exp(-s / gamma); dpace, by how likely they are reached")
    gamma: float | None = Field(None, gt=0, description="of decay; none: 7 for blocks of more than 8, else 4")
    num_anchors: int = Field(512, ge=1, description="blocks of a sequence trained on at once")
    whole_blocks: bool = Field(True, description="blocks need all their tokens in the document; else those at its end are trained on as far as it goes")

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def decay(self) -> float:
        """Slots over which weights fall to 1 / e."""
        return self.gamma or (7.0 if self.block_size > 8 else 4.0)

    @model_validator(mode="after")
    def _fits(self) -> BlockConfig:
        if self.hidden_size != self.target_hidden_size:
            raise ValueError(f"hidden_size {self.hidden_size} must be the target's, whose embedding and head are used: {self.target_hidden_size}")
        if self.mask_token_id >= self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} is none of {self.vocab_size} tokens")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} is more than the target's {self.vocab_size}")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, head_dim even")
        ids = self.aux_hidden_state_layer_ids
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= self.num_target_layers:
            raise ValueError(f"aux_hidden_state_layer_ids {ids} must be different layers of the target's {self.num_target_layers}")
        return self


def feature_layers(layers: int, count: int) -> tuple[int, ...]:
    """Layers of a target to read: `count` of them, fewer where it has few, from the second to the third before the last, evenly."""
    count = min(count, max(layers - 3, 1))
    return (layers // 2,) if count == 1 else tuple(round(1 + i * (layers - 4) / (count - 1)) for i in range(count))


class BlockLayer(nn.Module):
    """One decoder layer of Qwen3's shape."""

    def __init__(self, config: BlockConfig, attention: type[Attention]) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = attention(hidden, hidden, config.num_attention_heads, config.num_key_value_heads, config.head_dim, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(hidden, config.intermediate_size)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """[B, R, H] of x [B, R, H]."""
        attn, read = self.self_attn, self.input_layernorm(x)
        x = x + attn.out(attend(attn.queries(read, turn), attn.keys(read, turn), attn.values(read)))
        return x + self.mlp(self.post_attention_layernorm(x))


class BlockDraft(Draft):
    """A draft that proposes a block at a time.

    Attributes:
        num_layers: L unless told.
        num_features: n unless told.
        attention: of a layer.
        corrects: the token before changes a slot's hidden (`corrected`), so that slots are drafted in turn.
        biases: it changes a slot's logits (`bias`), so that they are.
        needs_target: training compares with the target's distribution whatever the loss.
    """

    Config: ClassVar[type[BlockConfig]] = BlockConfig
    num_layers: ClassVar[int] = 5
    num_features: ClassVar[int] = 5
    attention: ClassVar[type[Attention]] = Attention
    corrects: ClassVar[bool] = False
    biases: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config, self.attention) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config.head_dim, config.rope_parameters, config.max_position_embeddings)
        add_vocabulary(self, config.vocab_size, config.draft_vocab_size)

    @classmethod
    def from_target(cls, target: TargetShape, *, draft_vocab_size: int | None = None, **options: Any) -> BlockDraft:
        """
        Args:
            options: fields of `Config`.

        Raises:
            UsageError: an option is unknown or does not fit the target.
        """
        values = {
            "hidden_size": target.hidden_size, "intermediate_size": target.intermediate_size, "num_hidden_layers": cls.num_layers,
            "num_attention_heads": target.num_attention_heads, "num_key_value_heads": target.num_key_value_heads, "head_dim": target.head_dim,
            "vocab_size": target.vocab_size, "draft_vocab_size": draft_vocab_size or target.vocab_size, "rms_norm_eps": target.rms_norm_eps,
            "rope_parameters": draft_rope(target.rope_parameters), "max_position_embeddings": target.max_position_embeddings,
            "target_hidden_size": target.hidden_size, "num_target_layers": target.num_layers, "mask_token_id": target.vocab_size - 1,
            "aux_hidden_state_layer_ids": feature_layers(target.num_layers, cls.num_features),
            "target_fingerprint": target.fingerprint,
        }  # fmt: skip
        try:
            config = cls.Config(**{**values, **options})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                720, ".".join([cls.name, *map(str, first["loc"])]), first["msg"], "an option of the draft that its target cannot go with"
            ) from None
        draft = cls(config)
        draft.initialise()
        return draft

    def initialise(self) -> None:
        """Random weights; what is added to the residual stream begins small."""
        small = 0.02 / (2 * len(self.layers)) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=small if name.endswith(("o_proj", "down_proj")) else 0.02)

    @abstractmethod
    def contexts(self, aux: Tensor) -> Tensor:
        """What each layer's keys and values are made of.

        Args:
            aux: [B, T, n H].

        Returns:
            [L, B, T, H], or [1, B, T, H] if all layers read the same.
        """

    def context_weights(self) -> tuple[Tensor, Tensor]:
        """Weights of the context's keys and values of all layers, [L, H, 2 g D], and of the norms of its keys, [L, 1, 1, 1, D]."""
        layers: list[Any] = [layer.self_attn for layer in self.layers]
        projections = [self.context_projections(attn) for attn in layers]
        norms = torch.stack([attn.k_norm.weight for attn in layers])
        return torch.stack([torch.cat((k.weight, v.weight)) for k, v in projections]).mT, norms[:, None, None, None]

    def context_projections(self, attn: Any) -> tuple[nn.Linear, nn.Linear]:
        """A layer's projections of the context: those of the block's rows."""
        return attn.k_proj, attn.v_proj

    def context(self, aux: Tensor, turn: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, [L, B, g, T, D] each, of aux [B, T, n H] and `context_weights`."""
        projection, norms = weights
        made = self.contexts(aux.to(projection.dtype))
        shape = (len(projection), *made.shape[1:3], 2, -1, self.config.head_dim)
        k, v = (made.flatten(1, 2) @ projection).view(shape).permute(3, 0, 1, 4, 2, 5)
        return rotate(functional.rms_norm(k, k.shape[-1:], None, self.config.rms_norm_eps) * norms.to(k.dtype), turn), v

    def block(self, ids: Tensor, heads: Heads, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """What rows of blocks become, after the final norm, [B, R, H], of ids [B, R]."""
        x = heads.embed(ids).to(self.norm.weight.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, turn, lambda q, k, v, number=number: attend(number, q, k, v))
        return self.norm(x)

    def corrected(self, hidden: Tensor, before: Tensor) -> Tensor:
        """[..., H] of slots' hidden [..., H] and of the embeddings [..., H] of the tokens before those they draft."""
        return hidden

    def bias(self, before: Tensor) -> Tensor:
        """[..., Vd], what is added to logits, of the tokens [...] before those that slots draft."""
        raise NotImplementedError

    def confidence(self, hidden: Tensor, before: Tensor) -> Tensor | None:
        """Logits [...] of the chance that a slot's token is accepted, of its hidden [..., H] and the token before; None: it is the token's probability."""
        return None

    def head(self, heads: Heads) -> Tensor:
        """[Vd, H], rows of the target's head."""
        rows = vocabulary_ids(self)
        return heads.head if rows is None else heads.head[rows]

    def train_loss(self, batch: Batch, heads: Heads) -> Loss:
        """One entry a slot; `hits` are choices that are the text's own next token. Anchors are drawn with torch's generator of the device."""
        config: BlockConfig = self.config
        slots, length = config.num_tokens, batch.ids.shape[1]
        anchors, kept = choose_anchors(batch, config.num_anchors, slots if config.whole_blocks else 1)
        hidden = self._train_hidden(batch, heads, Sight(anchors, kept, batch.documents, config.block_size))[:, :, -slots:].flatten(0, 1)  # [B A, K, H]

        at = anchors[..., None] + torch.arange(1, slots + 1, device=anchors.device)  # of the tokens to draft
        inside, at = at < length, at.clamp(max=length - 1)
        sequence = torch.arange(len(at), device=at.device)[:, None, None]
        alive = batch.loss_mask[sequence, at] & inside & kept[..., None] & (batch.documents[sequence, at] == batch.documents.gather(1, anchors)[..., None])
        alive = alive.cumprod(-1).bool().flatten(0, 1)  # [B A, K]
        text, before = batch.ids[sequence, at].flatten(0, 1), batch.ids[sequence, at - 1].flatten(0, 1)
        labels = self._draft_ids(text)
        of = self._terms(hidden, before, labels, batch.final.flatten(0, 1), (sequence * length + at - 1).flatten(), heads)
        sums, count, weights = per_slot(config.loss, config.weighting, config.decay, of, labels, alive)
        sums = sums + self._confidence_loss(hidden, before, of, weights * alive)
        return Loss(sums, count.expand(slots), torch.ones_like(sums), (of.hit & alive).sum(0), alive.sum(0))

    def _train_hidden(self, batch: Batch, heads: Heads, sight: Sight) -> Tensor:
        """[B, A, S, H]: each block after its own context."""
        config: BlockConfig = self.config
        ids = batch.ids.gather(1, sight.anchors)[..., None]
        ids = torch.cat((ids, torch.full_like(ids, config.mask_token_id).expand(-1, -1, config.block_size - 1)), -1).flatten(1)
        places = batch.positions.gather(1, sight.anchors)[..., None] + torch.arange(config.block_size, device=ids.device)
        past_k, past_v = self.context(batch.aux, self.rope(batch.positions), self.context_weights())
        over = attention(sight)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return over(q, torch.cat((past_k[layer], k), 2), torch.cat((past_v[layer], v), 2))

        return self.block(ids, heads, self.rope(places.flatten(1)), attend).unflatten(1, (-1, config.block_size))

    def _terms(self, hidden: Tensor, before: Tensor, labels: Tensor, final: Tensor, sources: Tensor, heads: Heads) -> Terms:
        """Terms [N, K]; sources [N K] are rows of final [B T, H], out of which the target says the same tokens."""
        config: BlockConfig = self.config
        head, tokens = self.head(heads), before.flatten()

        def logits(rows: Tensor, start: int, stop: int) -> Tensor:
            known = tokens[start:stop]
            if self.corrects:
                rows = self.corrected(rows, heads.embed(known).to(rows.dtype))
            out = rows @ head.to(rows.dtype).T
            return out + self.bias(known) if self.biases else out

        told = teacher(final, heads, vocabulary_ids(self)) if config.loss != "ce" or self.needs_target else None
        of = terms(config.loss, hidden.flatten(0, 1), labels.flatten(), logits, told, sources, len(head))
        return Terms(*(value.view(labels.shape) for value in (of.cross, of.apart, of.hit, of.accepted)))

    def _confidence_loss(self, hidden: Tensor, before: Tensor, of: Terms, weights: Tensor) -> Tensor:
        """[K]: binary cross entropy of `confidence` to the chance of being accepted, weighted as the rest; 0 without."""
        logits = self.confidence(hidden, before)
        if logits is None:
            return weights.new_zeros(weights.shape[1])
        return (functional.binary_cross_entropy_with_logits(logits.float(), of.accepted, reduction="none") * weights).sum(0)

    def _draft_ids(self, ids: Tensor) -> Tensor:
        """The draft's number of each of the target's ids, -1 where it has none."""
        if vocabulary_ids(self) is None:
            return ids
        t2d: Any = self.t2d
        return torch.where(t2d[ids], (t2d.cumsum(0) - 1)[ids], -1)

    def drafter(self, heads: Heads) -> Drafter:
        from ..drafters.block import BlockDrafter

        return BlockDrafter(self, heads)
