"""Rounds of trees: to grow one, to say what its tokens see, to accept a path and to keep its keys and values.

Shapes: B rows, N proposed tokens, D levels, V vocabulary, Vd the draft's, k children of a node, W nodes that are expanded, A positions that
these see, C candidates, H heads of keys, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..verification.tree import tree_greedy
from .verify_attention import MOST_TOKENS, on_cpu, on_gpu

# a program holds each candidate of a level beside each other
MOST_CHILDREN = 16
# keys of all pieces of the vocabulary that a program holds at once
MOST_KEYS = 8192
MOST_CANDIDATES = 1024


class Front(NamedTuple):
    """Nodes to expand next, the best first.

    Args:
        tokens: [B, k], int64.
        origin: [B, k], int64: which of the nodes before is each one's parent.
        numbers: [B, k], int64: as candidates.
        scores: [B, k], fp32: logarithms of the draft's probabilities of their paths.
        visible: [B, k, A + k], bool: which of the steps' own positions each sees.
    """

    tokens: Tensor
    origin: Tensor
    numbers: Tensor
    scores: Tensor
    visible: Tensor


class Candidates(NamedTuple):
    """All children of nodes that were expanded.

    Args:
        tokens: [B, C], int64.
        parents: [B, C], int64: numbers of candidates, -1 the root.
        scores: [B, C], fp32, as `Front.scores`.
        sure: [B, C], fp32: the draft's probability of each token.
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor
    sure: Tensor

    @classmethod
    def room(cls, batch: int, count: int, device: torch.device) -> Candidates:
        """Memory for C of them."""
        return cls(*(torch.empty(batch, count, dtype=dtype, device=device) for dtype in (torch.int64, torch.int64, torch.float32, torch.float32)))


def ranked(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest values along the last dimension and where they are, of equals the first."""
    found = x.sort(dim=-1, descending=True, stable=True)
    return found.values[..., :count], found.indices[..., :count]


def _picked(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `ranked`, without sorting rows whose last value is no other's: on CPUs."""
    at = x.topk(count, -1).indices.sort(-1).values
    values, order = ranked(x.gather(-1, at), count)
    at = at.gather(-1, order)
    if (tied := (x >= values[..., -1:]).sum(-1) > count).any():
        values[tied], at[tied] = ranked(x[tied], count)
    return values, at


def expand(
    logits: Tensor, columns: Tensor | None, front: Front | None, into: Candidates, base: int, k: int, last: bool,
    best: Callable[[Tensor, int], tuple[Tensor, Tensor]] = ranked,
) -> Front | None:  # fmt: skip
    """Write down the k most probable tokens after each node, and choose the nodes to expand next.

    Args:
        logits: [B, W, Vd].
        columns: [Vd], int64: the token of each; None: its number.
        front: the nodes; None: the root alone.
        into: written, W k from `base` on, in the nodes' order.
        last: none is expanded any more.

    Returns:
        the k best of the new candidates, of equals the first; None after the last level.

    Source: EAGLE-2, arXiv:2406.16858.
    """
    logs, chosen = best(logits.float().log_softmax(-1), k)
    here = slice(base, base + chosen.shape[1] * k)
    tokens, scores = chosen if columns is None else columns[chosen], logs if front is None else front.scores[..., None] + logs
    into.tokens[:, here], into.scores[:, here], into.sure[:, here] = tokens.flatten(1), scores.flatten(1), logs.exp().flatten(1)
    into.parents[:, here] = -1 if front is None else front.numbers.repeat_interleave(k, 1)
    if last:
        return None
    reached, at = best(scores.flatten(1), k)
    own, origin = torch.eye(k, dtype=torch.bool, device=at.device).expand(len(at), -1, -1), at // k
    before = own[..., :0] if front is None else front.visible.gather(1, origin[..., None].expand(-1, -1, front.visible.shape[2]))
    return Front(tokens.flatten(1).gather(1, at), origin, base + at, reached, torch.cat((before, own), -1))


def choose_tree(candidates: Candidates, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates of the greatest scores, of equals the first, in the order they are in.

    Returns:
        tokens [B, count], their parents by number of proposed token, -1 the root, and the draft's probabilities.
    """
    # a parent's score is never below its child's and of equal ones the earlier comes first, so that no child is without its parent
    chosen = ranked(candidates.scores, count)[1].sort(-1).values
    place = torch.zeros_like(candidates.tokens).scatter_(1, chosen, torch.arange(count, device=chosen.device).expand_as(chosen))
    parents = candidates.parents.gather(1, chosen)
    parents = torch.where(parents < 0, parents, place.gather(1, parents.clamp(min=0)))
    return candidates.tokens.gather(1, chosen), parents, candidates.sure.gather(1, chosen)


def ancestors_of(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of a tree each one follows, itself included, the root first: [B, N + 1, N + 1], bool; and how many others: [B, N + 1], int64.

    Args:
        parents: [B, N], int64: -1 is the root; parents come before their children.
    """
    batch, proposed = parents.shape
    steps = torch.eye(proposed + 1, device=parents.device).repeat(batch, 1, 1)
    steps[:, 1:].scatter_(2, parents[..., None] + 1, 1.0)
    for _ in range((proposed - 1).bit_length() if proposed else 0):  # each product doubles how far back it reaches
        steps = (steps @ steps).clamp(max=1.0)
    return steps > 0, (steps > 0).sum(-1) - 1


def accept_tree(logits: Tensor, tokens: Tensor, parents: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`verification.tree_greedy` of the most probable tokens of logits [B, N + 1, V], of several the first; and the path's tokens.

    Returns:
        path [B, D], accepted [B], following [B], and tokens [B, D], behind the path any; all int64.
    """
    path, accepted, following = tree_greedy(logits.argmax(-1), tokens, parents, depth)
    return path, accepted, following, tokens.gather(1, path.clamp(min=0))


class Stored(NamedTuple):
    """Keys and values of all layers.

    Args:
        tensors: [B, H, S, width] each.
        table: int64: where each begins; None: they are not all of one shape, strides and dtype.
    """

    tensors: Sequence[Tensor]
    table: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Stored:
        """Of tensors that stay where they are."""
        alike = len({(x.shape, x.stride(), x.dtype, x.device) for x in tensors}) == 1 and tensors[0].stride(-1) == 1
        return cls(tensors, torch.tensor([x.data_ptr() for x in tensors], device=tensors[0].device) if alike else None)


def keep_path(stored: Stored, lengths: Tensor, path: Tensor) -> None:
    """Move what was accepted of a tree to where a chain would have it: behind `lengths` and the first token of the round.

    Args:
        lengths: [B], int64: confirmed slots.
        path: [B, D], int64: which of the proposed tokens each further one is, rising; -1 behind them.
    """
    number = torch.arange(path.shape[1], device=path.device)
    rows, first = torch.arange(len(path), device=path.device)[:, None], lengths[:, None] + 1
    to, came = first + number, first + torch.where(path < 0, number, path)
    for whole in stored.tensors:
        whole[rows, :, to] = whole[rows, :, came]


def _on_cpu(first: Tensor | Stored | Candidates, *_: object) -> tuple[bool, str]:
    return on_cpu(first if isinstance(first, Tensor) else first.tensors[0] if isinstance(first, Stored) else first.tokens)


def _expand_triton(
    logits: Tensor, columns: Tensor | None, front: Front | None, into: Candidates, base: int, k: int, last: bool
) -> Front | None:  # fmt: skip
    from .triton.tree import expand

    return expand(logits, columns, front, into, base, k, last)


def _choose_triton(candidates: Candidates, count: int) -> tuple[Tensor, Tensor, Tensor]:
    from .triton.tree import choose_tree

    return choose_tree(candidates, count)


def _ancestors_triton(parents: Tensor) -> tuple[Tensor, Tensor]:
    from .triton.tree import ancestors_of

    return ancestors_of(parents)


def _accept_triton(logits: Tensor, tokens: Tensor, parents: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton.tree import accept_tree

    return accept_tree(logits, tokens, parents, depth)


def _keep_triton(stored: Stored, lengths: Tensor, path: Tensor) -> None:
    from .triton.tree import keep_path

    keep_path(stored, lengths, path)


def _expand_fits(
    logits: Tensor, columns: Tensor | None, front: Front | None, into: Candidates, base: int, k: int, last: bool
) -> tuple[bool, str]:  # fmt: skip
    from .triton.tree import piece_of

    if k > min(MOST_CHILDREN, logits.shape[2]) or logits.shape[1] > MOST_CHILDREN or logits.stride(-1) != 1 or piece_of(logits, k) is None:
        return False, f"up to {MOST_CHILDREN} nodes and children of each, and not more of all than {MOST_KEYS} for the vocabulary's pieces"
    if torch.is_grad_enabled() and logits.requires_grad:
        return False, "no gradients"
    return on_gpu(logits)


def _choose_fits(candidates: Candidates, count: int) -> tuple[bool, str]:
    if candidates.tokens.shape[1] > MOST_CANDIDATES:
        return False, f"up to {MOST_CANDIDATES} candidates"
    return on_gpu(candidates.tokens)


def _ancestors_fits(parents: Tensor) -> tuple[bool, str]:
    return on_gpu(parents) if parents.shape[1] < MOST_TOKENS else (False, f"fewer than {MOST_TOKENS} proposed tokens")


def _accept_fits(logits: Tensor, tokens: Tensor, parents: Tensor, depth: int) -> tuple[bool, str]:
    if logits.stride(-1) != 1:
        return False, "logits of one beside each other"
    return _ancestors_fits(parents)


def _keep_fits(stored: Stored, lengths: Tensor, path: Tensor) -> tuple[bool, str]:
    return on_gpu(path) if stored.table is not None else (False, "keys and values of one shape and dtype")


def _kernel(
    name: str, reference: Callable[..., Any], triton: Callable[..., Any], fits: Callable[..., tuple[bool, str]], on_cpus: Callable[..., Any] | None = None
) -> Kernel:  # fmt: skip
    ways = Implementation("torch", on_cpus or reference, _on_cpu), Implementation("triton", triton, fits, triton_runs), Implementation("steps", reference)
    return Kernel(f"specdec.{name}", reference, ways)


EXPAND = _kernel("expand", expand, _expand_triton, _expand_fits, partial(expand, best=_picked))
CHOOSE_TREE = _kernel("choose_tree", choose_tree, _choose_triton, _choose_fits)
ANCESTORS_OF = _kernel("ancestors_of", ancestors_of, _ancestors_triton, _ancestors_fits)
ACCEPT_TREE = _kernel("accept_tree", accept_tree, _accept_triton, _accept_fits)
KEEP_PATH = _kernel("keep_path", keep_path, _keep_triton, _keep_fits)
KERNELS = EXPAND, CHOOSE_TREE, ANCESTORS_OF, ACCEPT_TREE, KEEP_PATH
