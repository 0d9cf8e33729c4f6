"""What stands between the products of a layer, each in one launch: norms, RoPE with the cache, gated activation, the choice of a token.

Shapes: N rows, B rows of the batch, T tokens of each, H hidden, W width of embeddings, V vocabulary, Vd the head's, I inner width of an MLP,
h heads of queries, g of keys and values, D of a head, S slots, P positions of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from .verify_attention import on_cpu, on_gpu

# how an RMSNorm comes back to the dtype of its input: after the weight, "once"; before it and after, "twice", as Llama's does; or after a weight
# that is stored less one, "plus_one", as Gemma's is
Rounding = Literal["once", "twice", "plus_one"]
# weights of the norms of each head of queries and of keys, their epsilon, and how they round
HeadNorms = tuple[Tensor, Tensor, float, Rounding]
# what a program of `norm` holds at once
MOST_WIDTH = 32768
# of a head
MOST_HEAD = 512


def norm(x: Tensor, weight: Tensor, eps: float, rounding: Rounding = "once") -> Tensor:
    """x / rms(x) * weight over the last dimension, [..., H], weight [H]."""
    if rounding == "once":
        return functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype) if rounding == "twice" else (normed * (1.0 + weight.float())).to(x.dtype)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, and its `norm`, [..., H]."""
    total = residual + x
    return total, norm(total, weight, eps)


def embed_norms(tokens: Tensor, carried: Tensor, embedding: Tensor, scale: float, of_embedding: Tensor, of_carried: Tensor, eps: float) -> Tensor:
    """Embeddings of tokens and what is carried, each after its norm, side by side.

    Args:
        tokens: [B, T], int64.
        carried: [B, T, H].
        embedding: [V, W], of any dtype; times `scale`.

    Returns:
        [B, T, W + H], as `carried`.
    """
    found = functional.embedding(tokens, embedding)
    found = (found if scale == 1.0 else found * scale).to(carried.dtype)
    return torch.cat((norm(found, of_embedding, eps), norm(carried, of_carried, eps)), -1)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., I]."""
    return functional.silu(gate) * up


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, h, T, D] turned by cosine and sine, [B or 1, 1, T, D], in halves as Llama does."""
    cos, sin = (part.to(x.dtype) for part in turn)
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by RoPE, in halves, after a norm of each head if there is one.

    Args:
        q: [B, T, h, D].
        k: [B, T, g, D].
        cos, sin: [B or 1, T, D].

    Returns:
        [B, h, T, D] and [B, g, T, D].
    """
    if norms is not None:
        q, k = norm(q, norms[0], *norms[2:]), norm(k, norms[1], *norms[2:])
    turn = cos[:, None], sin[:, None]
    return rotate(q.transpose(1, 2), turn), rotate(k.transpose(1, 2), turn)


def turn_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, offset: int = 0, level: int | None = None,
    norms: HeadNorms | None = None,
) -> Tensor:  # fmt: skip
    """`turned` queries; keys and values go to the slots behind `lengths + offset`, what finds none to the last one.

    Args:
        q, k, v: [B, T, h or g, D].
        cos, sin: [B or 1, T, D]; or a table [P, D], of which each token takes the row of its slot's number, the last one at most.
        keys, values: [B, g, S, D], written to.
        lengths: [B], int64.
        level: of a table: all tokens take row `lengths + level`.

    Returns:
        [B, h, T, D].
    """
    slots = lengths[:, None] + torch.arange(q.shape[1], device=q.device) + offset
    if cos.dim() == 2:
        rows = (slots if level is None else (lengths[:, None] + level).expand_as(slots)).clamp(max=len(cos) - 1)
        cos, sin = cos[rows], sin[rows]
    q, k = turned(q, k, cos, sin, norms)
    rows, slots = torch.arange(len(q), device=q.device)[:, None], slots.clamp(max=keys.shape[2] - 1)
    keys[rows, :, slots] = k.transpose(1, 2)
    values[rows, :, slots] = v
    return q


def choose(logits: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The most probable token of each row, of equals the first, and its probability.

    Args:
        logits: [N, Vd].
        columns: [Vd], int64: the token of each; None: its number.

    Returns:
        [N], int64, and [N], fp32.
    """
    best, chosen = logits.softmax(-1, dtype=torch.float32).max(-1)
    return chosen if columns is None else columns[chosen], best


def _norm_triton(x: Tensor, weight: Tensor, eps: float, rounding: Rounding = "once") -> Tensor:
    from .triton.layer import norm

    return norm(x, None, weight, eps, rounding)[1]


def _add_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .triton.layer import norm

    return norm(x, residual, weight, eps, "once")


def _embed_norms_triton(
    tokens: Tensor, carried: Tensor, embedding: Tensor, scale: float, of_embedding: Tensor, of_carried: Tensor, eps: float
) -> Tensor:  # fmt: skip
    from .triton.layer import embed_norms

    return embed_norms(tokens, carried, embedding, scale, of_embedding, of_carried, eps)


def _gated_triton(gate: Tensor, up: Tensor) -> Tensor:
    from .triton.layer import gated

    return gated(gate, up)


def _turned_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor]:
    from .triton.layer import turn

    return turn(q, k, k, cos, sin, norms=norms)


def _store_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, offset: int = 0, level: int | None = None,
    norms: HeadNorms | None = None,
) -> Tensor:  # fmt: skip
    from .triton.layer import turn

    return turn(q, k, v, cos, sin, (keys, values, lengths), offset, level, norms)[0]


def _choose_triton(logits: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from .triton.layer import choose

    return choose(logits, columns)


def _fits(rows: Tensor, *others: Tensor) -> tuple[bool, str]:
    used = rows, *others
    if torch.is_grad_enabled() and any(x.requires_grad for x in used):
        return False, "no gradients"
    if any(x.dtype == torch.float64 for x in used):
        return False, "up to FP32"
    return on_gpu(rows)


def _norm_fits(x: Tensor, *others: object) -> tuple[bool, str]:
    if x.shape[-1] > MOST_WIDTH:
        return False, f"rows up to {MOST_WIDTH} wide"
    return _fits(x, *(y for y in others if isinstance(y, Tensor)))


def _embed_fits(tokens: Tensor, carried: Tensor, embedding: Tensor, *_: object) -> tuple[bool, str]:
    if max(carried.shape[-1], embedding.shape[1]) > MOST_WIDTH or embedding.stride(1) != 1:
        return False, f"rows up to {MOST_WIDTH} wide, one value beside the other"
    return _fits(carried, embedding)


def _turned_fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> tuple[bool, str]:
    width = q.shape[-1]
    if width > MOST_HEAD or width % 2 or cos.shape[-1] != width or any(x.stride(-1) != 1 for x in (q, k, cos, sin)):
        return False, f"heads of an even width up to {MOST_HEAD}, all of it turned, one value beside the other"
    return _fits(q, k, cos)


def _store_fits(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, offset: int = 0, level: int | None = None,
    norms: HeadNorms | None = None,
) -> tuple[bool, str]:  # fmt: skip
    if v.shape[-1] != q.shape[-1] or any(x.stride(-1) != 1 for x in (v, keys, values)):
        return False, "values as wide as keys, one value beside the other"
    return _turned_fits(q, k, cos, sin)


def _choose_fits(logits: Tensor, columns: Tensor | None = None) -> tuple[bool, str]:
    if logits.stride(-1) != 1:
        return False, "logits of one row beside each other"
    return _fits(logits)


def _kernel(name: str, reference: Callable[..., Any], triton: Callable[..., Any], fits: Callable[..., tuple[bool, str]]) -> Kernel:
    ways = Implementation("torch", reference, on_cpu), Implementation("triton", triton, fits, triton_runs), Implementation("steps", reference)
    return Kernel(f"specdec.{name}", reference, ways)


NORM = _kernel("norm", norm, _norm_triton, _norm_fits)
ADD_NORM = _kernel("add_norm", add_norm, _add_norm_triton, _norm_fits)
EMBED_NORMS = _kernel("embed_norms", embed_norms, _embed_norms_triton, _embed_fits)
GATED = _kernel("gated", gated, _gated_triton, _fits)
TURNED = _kernel("turned", turned, _turned_triton, _turned_fits)
TURN_AND_STORE = _kernel("turn_and_store", turn_and_store, _store_triton, _store_fits)
CHOOSE = _kernel("choose", choose, _choose_triton, _choose_fits)
KERNELS = NORM, ADD_NORM, EMBED_NORMS, GATED, TURNED, TURN_AND_STORE, CHOOSE
