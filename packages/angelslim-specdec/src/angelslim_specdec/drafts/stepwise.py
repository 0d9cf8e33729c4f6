"""Drafts of one layer that feed on their own outputs, a token a step, and how they are trained: unrolled over these steps.

Row t at step 0 reads the target's features of position t and the embedding of token t+1, and predicts token t+2. Step k reads, at the
same row, what step k-1 put out and the embedding of token t+1+k, and predicts token t+2+k; its rope position is t+k.

Shapes: B sequences, T tokens, L = B T, N rows, n tapped layers, H hidden, Vd draft vocabulary.
Source: EAGLE-3, arXiv:2503.01840 (training-time test).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from angelslim_core.errors import UsageError

from ..training.losses import Divergence, teacher, token_losses
from .base import Batch, Draft, DraftConfig, Heads, Loss, TargetShape
from .layers import MLP, Attention, RMSNorm, Rope, add_vocabulary, draft_rope, vocabulary_ids
from .ttt import Flex, Plain, segments


class StepwiseConfig(DraftConfig):
    """How such a draft is trained."""

    num_hidden_layers: Literal[1] = 1
    ttt_steps: int = Field(7, ge=1, le=16, description="tokens ahead that training unrolls")
    ttt_decay: float = Field(0.8, gt=0, le=1, description="weight of each step, of the one before")
    loss: Divergence = Field("ce", description="what is lowered; ce and kl skip tokens whose first choice the draft's vocabulary lacks")
    mask_align: Literal["predicted", "input"] = Field(
        "predicted", description="a step counts where the token it predicts is an answer's, or, as the original has it, where the one two before that is"
    )
    on_policy: bool = Field(False, description="later steps embed the draft's own first choice instead of the text")


class Stepwise(Draft):
    """A draft of one layer.

    Decoding does what `mix` and `finish` do by their parts, the same in fewer launches.

    Attributes:
        norm: the last one, which the head reads.
    """

    Config: ClassVar[type[StepwiseConfig]] = StepwiseConfig
    norm: RMSNorm

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rope = Rope(config.head_dim, config.rope_parameters, config.max_position_embeddings)
        add_vocabulary(self, config.vocab_size, config.draft_vocab_size)

    @classmethod
    def from_target(cls, target: TargetShape, *, draft_vocab_size: int | None = None, **options: Any) -> Draft:
        """As `Draft.from_target`; options are fields of the config, by default of the target's own sizes."""
        fields: dict[str, Any] = {
            "hidden_size": target.hidden_size, "intermediate_size": target.intermediate_size, "num_attention_heads": target.num_attention_heads,
            "num_key_value_heads": target.num_key_value_heads, "head_dim": target.head_dim, "vocab_size": target.vocab_size,
            "draft_vocab_size": min(draft_vocab_size or cls.default_vocabulary(target), target.vocab_size), "rms_norm_eps": target.rms_norm_eps,
            "rope_parameters": draft_rope(target.rope_parameters), "max_position_embeddings": target.max_position_embeddings,
            "target_hidden_size": target.hidden_size, "num_target_layers": target.num_layers, "aux_hidden_state_layer_ids": cls.tapped(target.num_layers),
            "target_fingerprint": target.fingerprint,
        }  # fmt: skip
        try:
            config = cls.Config(**{**fields, **options})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                715, f"{cls.name}: {'.'.join(map(str, first['loc']))}", first["msg"], f"options are {', '.join(cls.Config.model_fields)}"
            ) from error
        wrong = [i for i in config.aux_hidden_state_layer_ids if not 0 <= i < target.num_layers]
        if wrong or not config.aux_hidden_state_layer_ids:
            raise UsageError(716, f"{cls.name}: aux_hidden_state_layer_ids", f"{wrong or 'none'}", f"the target has layers 0 to {target.num_layers - 1}")
        return cls(config)

    @classmethod
    def default_vocabulary(cls, target: TargetShape) -> int:
        """Vd where none is asked for."""
        return target.vocab_size

    @classmethod
    @abstractmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Layers to read of a target that has so many."""

    @property
    @abstractmethod
    def layer(self) -> nn.ModuleDict:
        """The decoder layer, which has at least `layer_parts`."""

    @property
    @abstractmethod
    def norms(self) -> tuple[RMSNorm, RMSNorm]:
        """Of the next token's embedding, and of what is carried, which stand side by side afterwards."""

    @property
    def feeds_normed(self) -> bool:
        """Whether the next step reads what the head reads, and not what that is the norm of."""
        return False

    @property
    def attention(self) -> Attention:
        """Its projections."""
        found = self.layer["self_attn"]
        assert isinstance(found, Attention)
        return found

    @abstractmethod
    def features(self, aux: Tensor) -> Tensor:
        """[..., H], what stands for the draft's own output at step 0, of the target's [..., n H]."""

    def mix(self, embedding: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """What attention adds to, [..., H], and what it reads, of the next token's embedding and the features or the own output."""
        of_embedding, of_carried = self.norms
        return self.mixed(torch.cat((of_embedding(embedding), of_carried(carried)), -1), carried)

    @abstractmethod
    def mixed(self, pair: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """What `mix` gives, of what came out of the norms and what is carried."""

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The own output that the next step reads, and what the head reads, [..., H], of what attention has been added to."""
        hidden = hidden + self.layer["mlp"](self.layer["post_attention_layernorm"](hidden))
        read = self.norm(hidden)
        return read if self.feeds_normed else hidden, read

    @abstractmethod
    def head_weight(self, heads: Heads) -> Tensor:
        """[Vd, H]."""

    def drafter(self, heads: Heads, tree: Any = None) -> Any:
        """As `Draft.drafter`.

        Args:
            tree: `drafters.autoregressive.Tree` to propose instead of a chain.
        """
        from ..drafters.autoregressive import Autoregressive

        return Autoregressive(self, heads, tree)

    def train_loss(self, batch: Batch, heads: Heads) -> Loss:
        config, (rows, columns) = self.config, batch.ids.shape
        steps, lean = config.ttt_steps, batch.ids.device.type == "cpu"
        segment = segments(batch.documents)
        shape = (1, rows * columns) if lean else (rows, columns)  # on a CPU one sequence, of which later steps leave rows out
        see = Plain(segment.view(shape)) if lean else Flex(segment)
        vocabulary = vocabulary_ids(self)

        flat = segment.flatten()
        told_at = _told(batch, flat, config.mask_align == "predicted")
        gates = [_ahead(told_at, 1 + k, False) & (_ahead(flat, 1 + k, -1) == flat) for k in range(steps)]
        chosen = [gate.nonzero()[:, 0] for gate in gates]
        told = teacher(batch.final.flatten(0, 1)[told_at], heads, vocabulary)
        number, known = told_at.cumsum(0) - 1, _known(told.best, self, config.loss)
        weight = self.head_weight(heads)
        later_rows = torch.stack(gates[1:]).any(0).nonzero()[:, 0] if lean and steps > 1 else None

        ids, positions = batch.ids.flatten(), batch.positions.reshape(shape)
        carried = self.features(batch.aux.reshape(*shape, batch.aux.shape[-1]))
        inputs = _ahead(ids, 1, 0)
        past: list[tuple[Tensor, Tensor]] = []
        sums, counts, hits = [], [], []
        for k in range(steps):
            if k == 1 and later_rows is not None:
                carried, positions = carried.index_select(1, later_rows), positions[:, later_rows]
            live = later_rows if k else None
            embedding = heads.embed((inputs if live is None else inputs[live]).view(carried.shape[:-1]))
            residual, x = self.mix(embedding.to(carried.dtype), carried)
            turn = self.rope(positions + k)
            past.append((self.attention.keys(x, turn), self.attention.values(x)))
            attended = see(self.attention.queries(x, turn), *past[0], past[1:], live)
            carried, read = self.finish(residual + self.attention.out(attended))

            at, place = chosen[k], chosen[k] if live is None else torch.searchsorted(live, chosen[k])
            which = number[at + 1 + k]
            losses, best = token_losses(read.flatten(0, 1).index_select(0, place), weight, told, which, config.loss)
            own = best if vocabulary is None else vocabulary[best]
            sums.append((losses * known[which]).sum())
            counts.append(known[which].sum())
            hits.append((own == told.best[which]).sum())
            inputs = _ahead(ids, 2 + k, 0)
            if config.on_policy:
                inputs = inputs.index_copy(0, at, own)
        asked = torch.tensor([len(at) for at in chosen], dtype=torch.float32, device=flat.device)
        decay = torch.tensor([config.ttt_decay**k for k in range(steps)], device=flat.device)
        return Loss(torch.stack(sums), torch.stack(counts).float(), decay, torch.stack(hits).float(), asked)


def layer_parts(config: Any, inputs: int) -> dict[str, nn.Module]:
    """Attention that reads `inputs` features, and what follows it, as a decoder layer names them."""
    return {
        "self_attn": Attention(inputs, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        "post_attention_layernorm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        "mlp": MLP(config.hidden_size, config.intermediate_size),
    }


def _ahead(x: Tensor, by: int, fill: int | bool) -> Tensor:
    """x [L] moved so that element t is what was t + by."""
    return torch.cat((x[by:], x.new_full((min(by, len(x)),), fill)))


def _told(batch: Batch, segment: Tensor, predicted: bool) -> Tensor:
    """Positions [L], bool, whose word of the target counts: those before an answer's tokens, or one after."""
    mask, real = (x.flatten() for x in (batch.loss_mask, batch.documents >= 0))
    if predicted:
        return _ahead(mask, 1, False) & (_ahead(segment, 1, -1) == segment) & real
    behind, same = torch.zeros_like(mask), torch.zeros_like(mask)
    behind[1:], same[1:] = mask[:-1], segment[:-1] == segment[1:]
    return behind & same & real


def _known(best: Tensor, draft: nn.Module, loss: str) -> Tensor:
    """Which of the target's first choices [N] make a token count."""
    marks = getattr(draft, "t2d", None)
    return marks[best] if isinstance(marks, Tensor) and loss in ("ce", "kl") else torch.ones_like(best, dtype=torch.bool)
