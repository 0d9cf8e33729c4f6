"""What a draft model is: a small network that reads a target's hidden states and guesses its next tokens.

A draft folder holds `config.json` (`DraftConfig`, and `architectures` with the draft's only key) and `model.safetensors`; the
target's embedding and head are shared and never stored.

Shapes: B sequences, T tokens, n tapped layers, H hidden of the target, V its vocabulary, Vd the draft's.
Layer ids are numbers of layers whose output is read, from 0: j is transformers' `hidden_states[j + 1]`, before the final norm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..drafters.base import Drafter


class DraftConfig(BaseModel):
    """Shape of a draft and of the target it was made for; a family adds its own fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(1, ge=1, description="layers of the draft")
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1, description="of the target")
    draft_vocab_size: int = Field(ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_parameters: dict[str, Any] = Field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = Field(ge=1)
    target_hidden_size: int = Field(ge=1)
    num_target_layers: int = Field(ge=1)
    aux_hidden_state_layer_ids: tuple[int, ...] = Field((), description="layers of the target whose outputs are read")
    target_fingerprint: str = Field("", description="sha256 of the target's config and tensor headers; empty: any target of this shape")


@dataclass(frozen=True)
class TargetShape:
    """What a draft must know of a target before there is a model: sizes, rope, and where the template's special tokens are.

    Args:
        thought_end_id: token that closes a thought; -1: it has none.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    max_position_embeddings: int
    fingerprint: str = ""
    special_ids: Sequence[int] = field(default_factory=tuple)
    thought_end_id: int = -1


@dataclass
class Batch:
    """Tokens of training with what the target made of them.

    Args:
        ids: [B, T], int64.
        loss_mask: [B, T], bool: tokens of assistants' answers, their end included.
        documents: [B, T], int64: number of the document within the row, -1 where there is padding.
        positions: [B, T], int64: within the document, from 0.
        aux: [B, T, n H]: outputs of the tapped layers, side by side in the order of `aux_hidden_state_layer_ids`.
        final: [B, T, H]: what the target's head reads, after the final norm.
    """

    ids: Tensor
    loss_mask: Tensor
    documents: Tensor
    positions: Tensor
    aux: Tensor
    final: Tensor


@dataclass
class Loss:
    """Sums that a trainer divides by counts taken over all ranks: loss = sum_s weights[s] * sums[s] / counts[s].

    Args:
        sums: [S], fp32, with gradient.
        counts: [S], fp32: tokens that count in each.
        weights: [S], fp32.
        hits: [K]: tokens whose first choice is the target's own, of each one ahead; out of the draft's vocabulary is a miss.
        asked: [K]: tokens that `hits` is of.
    """

    sums: Tensor
    counts: Tensor
    weights: Tensor
    hits: Tensor
    asked: Tensor


class Heads(nn.Module):
    """The target's embedding and head, frozen and shared: never among the draft's parameters.

    Args:
        embedding: [V, H].
        head: [V, H].
        scale: what the target multiplies embeddings by.
    """

    def __init__(self, embedding: Tensor, head: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self._embedding, self._head, self.scale = embedding.detach(), head.detach(), scale

    @property
    def embedding(self) -> Tensor:
        return self._embedding

    @property
    def head(self) -> Tensor:
        return self._head

    def embed(self, ids: Tensor) -> Tensor:
        """[..., H] of ids [...]."""
        found = nn.functional.embedding(ids, self._embedding)
        return found if self.scale == 1.0 else found * self.scale

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """[..., V], or of the given rows of the vocabulary, in hidden's dtype."""
        return hidden @ (self._head if rows is None else self._head[rows]).to(hidden.dtype).T


class Draft(nn.Module, ABC):
    """A draft model.

    Attributes:
        name: what users call it, as in `--draft eagle3`.
        architecture: the only entry of `architectures` in its config.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    Config: ClassVar[type[DraftConfig]] = DraftConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config: Any = config

    @classmethod
    @abstractmethod
    def from_target(cls, target: TargetShape, *, draft_vocab_size: int | None = None, **options: Any) -> Draft:
        """A draft to train for a target, initialised; the vocabulary's selection is loaded later.

        Raises:
            UsageError: an option does not fit the target.
        """

    def begin(self, heads: Heads, norm: Tensor | None = None) -> None:
        """Before training, once the vocabulary is loaded: take from the target what helps; by default nothing.

        Args:
            norm: [H], weight of the target's final norm; None: not known.
        """

    @abstractmethod
    def train_loss(self, batch: Batch, heads: Heads) -> Loss:
        """What a step of training lowers."""

    @abstractmethod
    def drafter(self, heads: Heads) -> Drafter:
        """The draft as decoding uses it."""
