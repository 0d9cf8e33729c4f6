"""The small target that the kit decodes with, and the drafters that it tries on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from angelslim_core.model import auto_class

from ..drafters.autoregressive import Tree
from ..drafters.base import Drafter
from ..drafts.stepwise import Stepwise
from ..registry import drafters, drafts
from ..target import Target
from .drafters import Table

VOCABULARY, DRAFT_VOCABULARY = 12, 8
_TREE = Tree(depth=3, top_k=3, total=8)
NEW_TOKENS = 24
# of different lengths, the shortest possible among them, one that repeats itself
PROMPTS: tuple[tuple[int, ...], ...] = ((5,), (3, 4, 9, 3, 4, 9, 3, 4), (7, 10, 2, 6, 8))
SAMPLED_PROMPT = (3, 4, 9, 3, 4, 9, 3, 4)
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "initializer_range": 0.35, "max_position_embeddings": 128, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A drafter to try.

    Args:
        make: a new one.
        samples: it draws its tokens where it may.
        tree: proposes trees.
        pruned: it has a vocabulary of its own.
    """

    name: str
    make: Callable[[], Drafter]
    samples: bool = False
    tree: bool = False
    pruned: bool = False


def small_target(seed: int = 0) -> Target:
    """A random Llama in fp32 whose next token is neither certain nor arbitrary."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING["llama"](**_SHAPE)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():  # norms start at one, which would hide mistakes
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += torch.randn_like(parameter) * 0.1
    return Target(model)


def continuation(target: Target, prompt: Sequence[int], tokens: int) -> list[int]:
    """The target's own greedy continuation, by running all of it anew for each token: nothing here has a cache."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, target.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def bigrams(target: Target, seed: int = 0) -> Tensor:
    """Logits [V, V] for a table that is right now and then: the target's own after single tokens, and noise."""
    with torch.no_grad():
        logits = target.model(input_ids=torch.arange(VOCABULARY)[:, None]).logits[:, -1]
    return logits + 2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))


def ways(target: Target) -> list[Way]:
    """Every drafter that is registered, each draft model at random in fp32, with and without a vocabulary of its own."""
    found = [Way(name, drafter) for name, drafter in drafters().items()]
    heads, shape = target.heads(), target.shape
    for name, draft in drafts().items():
        for size in (VOCABULARY, DRAFT_VOCABULARY):
            with torch.random.fork_rng([]):
                torch.manual_seed(size)
                made = draft.from_target(shape, draft_vocab_size=size).float().eval()
                for weight in (p for p in made.parameters() if p.dim() > 1):  # what starts near zero would not notice what it reads
                    weight.data.normal_(std=_SHAPE["initializer_range"])
            label = name if size == VOCABULARY else f"{name}, {size} of {VOCABULARY} tokens"
            found.append(Way(label, partial(made.drafter, heads), samples=True, pruned=size < VOCABULARY))
            if isinstance(made, Stepwise):
                found.append(Way(f"tree of {label}", partial(made.drafter, heads, _TREE), tree=True, pruned=size < VOCABULARY))
    table, subset = bigrams(target), torch.tensor([1, 3, 4, 6, 7, 9, 10, 11])
    found.append(Way("table", lambda: Table(table), samples=True))
    found.append(Way("table, 8 of 12 tokens", lambda: Table(table[:, subset], subset), samples=True, pruned=True))
    found.append(Way("tree of a table", lambda: Table(table, tree=True), tree=True))
    return found
