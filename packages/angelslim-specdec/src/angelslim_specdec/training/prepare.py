"""From a file of conversations to rows that a draft is trained on, and to the draft itself."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from angelslim_core.calibration.chats import Conversation
from angelslim_core.calibration.packing import Row, cut, pack
from angelslim_core.calibration.spans import Renderer, Turns
from angelslim_core.errors import RecipeError, UsageError
from angelslim_core.model import decoder_layers

from ..drafts.base import Draft
from ..registry import draft_named
from ..vocabulary import Vocabulary
from .selection import coverage_of, select

if TYPE_CHECKING:
    from ..target import Target


@dataclass(frozen=True)
class Prepared:
    """Rows of a file of conversations.

    Args:
        rows: to train on; `held_out`: to validate on, none of whose conversations are in `rows`.
        prompts: tokens up to the first answer of held-out conversations, or where none is held out of those trained on.
        documents: how many there are, held-out ones among them; `dropped`: left out, since too little of an answer remained.
        template: sha256 of the chat template.
    """

    rows: list[Row]
    held_out: list[Row]
    prompts: list[list[int]]
    documents: int
    dropped: int
    template: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def spoken(self) -> int:
        """Tokens of answers to train on."""
        return sum(int(row.loss_mask.sum()) for row in self.rows)


def prepare(
    conversations: Sequence[Conversation], renderer: Renderer, length: int, *, validation: float = 0.0, turns: Turns = "joined", seed: int = 0
) -> Prepared:
    """Render, mask, cut and pack conversations.

    Args:
        validation: share of the conversations to hold out, in rows of their own.

    Raises:
        RecipeError: no answer begins within `length` tokens, or the template does not show one.
    """
    whole = list(renderer.documents(conversations, turns))
    documents, dropped = cut(whole, length)
    if not documents:
        raise RecipeError(734, "--length", f"no answer of {len(whole)} conversations begins within {length} tokens", "give a greater --length")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    held = set(order[: round(validation * len(documents))])
    trained = [d for i, d in enumerate(documents) if i not in held]
    kept = [d for i, d in enumerate(documents) if i in held]
    prompts = [p for d in kept or trained if (p := d.ids[: d.mask.index(True)])]  # an answer may be all there is
    digest = hashlib.sha256(renderer.template.encode()).hexdigest()
    return Prepared(pack(trained, length, seed), pack(kept, length, seed) if kept else [], prompts, len(documents), dropped, digest)


def new_draft(
    name: str, target: Target, rows: Sequence[Row], device: torch.device, *, vocabulary: Vocabulary | None = None, size: int | None = None,
    options: Mapping[str, Any] | None = None, seed: int = 0,
) -> tuple[Draft, float]:  # fmt: skip
    """A draft to train, in the target's dtype, and the share of the answers' tokens that it can propose.

    Args:
        vocabulary: selected before; None: by how often tokens occur in the rows.
        size: of the draft's vocabulary; None: as the draft is wont.

    Raises:
        UsageError: no such draft, or an option does not fit it.
    """
    size = len(vocabulary.ids) if vocabulary is not None else size
    if size is not None and size > target.shape.vocab_size:
        raise UsageError(740, "--draft-vocab", f"{size} tokens", f"the target has {target.shape.vocab_size}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        draft = draft_named(name).from_target(target.shape, draft_vocab_size=size, **(options or {}))
    coverage = 1.0
    if draft.config.draft_vocab_size < draft.config.vocab_size:
        vocabulary = vocabulary or select(rows, target, draft.config.draft_vocab_size)
        coverage = coverage_of(vocabulary, rows)
        with torch.no_grad():
            draft.get_buffer("d2t").copy_(vocabulary.d2t)
            draft.get_buffer("t2d").copy_(vocabulary.t2d)
    draft.to(target.device)
    draft.begin(target.heads(), last_norm(target))
    return draft.to(device, target.dtype), coverage


def last_norm(target: Target) -> Tensor | None:
    """Weight of what normalises the last layer's output, where that is a plain RMSNorm."""
    name, _ = decoder_layers(target.model, target.shape.num_layers)
    norm = getattr(target.model.get_submodule(name.rpartition(".")[0]), "norm", None)
    weight = getattr(norm, "weight", None)
    if not isinstance(norm, nn.Module) or not isinstance(weight, Tensor) or weight.shape != (target.shape.hidden_size,):
        return None
    x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        plain = nn.functional.rms_norm(x, weight.shape, weight, target.shape.rms_norm_eps)
        return weight.detach() if torch.allclose(norm(x[None])[0], plain, rtol=0.02, atol=0.02) else None
