"""Wrong builds of the engine, which the checks must tell from the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..cache import SlotCache
from ..drafters.base import Proposal
from ..kernels.settle import settle
from ..verification import draw, greedy, ratio, tree_greedy


@contextmanager
def replaced(where: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Inside, an attribute is another one."""
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def _one_row_more(self: SlotCache, counts: Tensor, path: Tensor | None = None) -> None:
    _COMMIT(self, torch.where(counts > 1, counts + 1, counts), path)


_COMMIT = SlotCache.commit


def _in_order(self: SlotCache, counts: Tensor, path: Tensor | None = None) -> None:
    _COMMIT(self, counts)


def _bonus_of_the_row_before(choices: Tensor, tokens: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    accepted, _ = greedy(choices, tokens, counts)
    return accepted, choices.gather(1, (accepted - 1).clamp(min=0)[:, None])[:, 0]


def _one_token_on_trust(choices: Tensor, tokens: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    accepted, _ = greedy(choices, tokens, counts)
    accepted = accepted.clamp(min=min(1, tokens.shape[1]))
    return accepted, choices.gather(1, accepted[:, None])[:, 0]


def _no_stops(tokens: Tensor, accepted: Tensor, following: Tensor, counts: Tensor | None, stops: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
    return settle(tokens, accepted, following, counts, stops[:0], *kept)


def _resampled(p: Tensor, tokens: Tensor, q: Tensor, columns: Tensor | None, uniforms: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    accepted, _ = ratio(p, tokens, q, columns, uniforms, counts)
    return accepted, draw(p[torch.arange(len(p)), accepted], uniforms[:, -1])


def _unnormalised(p: Tensor, tokens: Tensor, q: Tensor, columns: Tensor | None, uniforms: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    accepted, following = ratio(p, tokens, q, columns, uniforms, counts)
    rows, last = torch.arange(len(p)), tokens.shape[1]
    at = accepted.clamp(max=last - 1)
    below = (p[rows, at] - q[rows, at]).clamp(min=0).cumsum(-1)
    drawn = (below <= uniforms[:, -1:]).sum(-1).clamp(max=p.shape[-1] - 1)
    return accepted, torch.where(accepted < last, drawn, following)


def _one_draw_for_two(p: Tensor, tokens: Tensor, q: Tensor, columns: Tensor | None, uniforms: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return ratio(p, tokens, q, columns, uniforms[:, :1].expand_as(uniforms), counts)


def _of_what_was_drawn(proposal: Proposal, live: Tensor) -> Tensor:
    assert proposal.q is not None
    return _SCORES(replace(proposal, q=None, confidence=proposal.q.gather(2, proposal.tokens[..., None])[..., 0]), live)


_SCORES = engine.scores


def _tree_from_the_root(p: Tensor, tokens: Tensor, parents: Tensor, uniforms: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return tree_greedy(draw(p[:, :1].expand_as(p), uniforms), tokens, parents, depth)


def _of_choices(rule: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, tokens, counts=None: rule(logits.argmax(-1), tokens, counts)


def _of_probabilities(rule: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, warp, *rest: rule(warp(logits), *rest)


# name -> what is replaced, where, by what; the check that has to notice is `kit`'s to choose
GREEDY: Mapping[str, tuple[Any, str, Callable[..., Any]]] = {
    "wrong KV trim: a rejected token's keys stay": (SlotCache, "commit", _one_row_more),
    "bonus from the wrong row": (engine, "ACCEPT_GREEDY", _of_choices(_bonus_of_the_row_before)),
    "first token accepted, whatever it is": (engine, "ACCEPT_GREEDY", _of_choices(_one_token_on_trust)),
    "tree's accepted keys not moved": (SlotCache, "commit", _in_order),
    "stop token missed": (engine, "SETTLE", _no_stops),
}
SAMPLED: Mapping[str, tuple[Any, str, Callable[..., Any]]] = {
    "resampled from p after a rejection": (engine, "ACCEPT_RATIO", _of_probabilities(_resampled)),
    "residual not renormalised": (engine, "ACCEPT_RATIO", _of_probabilities(_unnormalised)),
    "one draw for two decisions": (engine, "ACCEPT_RATIO", _of_probabilities(_one_draw_for_two)),
    "cut by the confidence of what is verified": (engine, "scores", _of_what_was_drawn),
    "tree: draws from the wrong row": (engine, "tree_sample", _tree_from_the_root),
}
