"""What a round leaves: the tokens that stay, and what the engine keeps of each row.

Shapes: B rows, N tokens, W = N + 1 tokens of a round, s stop tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..stops import cut
from .verify_attention import on_cpu, on_gpu

# a program holds each token beside each stop token
MOST_PAIRS = 8192


def settle(
    tokens: Tensor, accepted: Tensor, following: Tensor, counts: Tensor | None, stops: Tensor, last: Tensor, remaining: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cut what was accepted, and what follows it, where the row ends, and write down what the next round and the host need.

    Args:
        tokens: [B, N], int64, of which the first were accepted.
        accepted: [B], int64.
        following: [B], int64: the target's token after them.
        counts: [B], int64: how many were proposed; None: N.
        stops: [s], int64.
        last: [B], int64, written: the row's last token.
        remaining: [B], int64, read and written: tokens that the row may still have, 0 once it has ended.
        out: [B, at least 4 + W], int64, written: accepted, kept, proposed, whether the row goes on, the tokens.

    Returns:
        the round's tokens [B, W], and how many stay [B], int64.
    """
    emitted = joined(tokens, accepted, following)
    kept, ended = cut(emitted, accepted + 1, remaining, stops)
    note(emitted, accepted, kept, ended, counts, last, remaining, out)
    return emitted, kept


def joined(tokens: Tensor, accepted: Tensor, following: Tensor) -> Tensor:
    """The accepted ones of tokens [B, N] and the one that follows them, [B, W]."""
    number = torch.arange(tokens.shape[1] + 1, device=tokens.device)
    return torch.where(number < accepted[:, None], pad(tokens, (0, 1)), following[:, None])


def note(emitted: Tensor, accepted: Tensor, kept: Tensor, ended: Tensor, counts: Tensor | None, last: Tensor, remaining: Tensor, out: Tensor) -> None:
    """Write down a round's tokens [B, W], of which the first stay; `ended` [B], bool: whether the row does; the rest as for `settle`."""
    remaining.copy_(torch.where(ended, 0, remaining - kept))
    last.copy_(emitted.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0])
    proposed = torch.full_like(kept, emitted.shape[1] - 1) if counts is None else counts
    out[:, :4] = torch.stack([accepted, kept, proposed, (~ended).long()], 1)
    out[:, 4 : 4 + emitted.shape[1]] = emitted


def _triton(
    tokens: Tensor, accepted: Tensor, following: Tensor, counts: Tensor | None, stops: Tensor, last: Tensor, remaining: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .triton.settle import settle

    return settle(tokens, accepted, following, counts, stops, last, remaining, out)


def _fits(
    tokens: Tensor, accepted: Tensor, following: Tensor, counts: Tensor | None, stops: Tensor, last: Tensor, remaining: Tensor, out: Tensor
) -> tuple[bool, str]:  # fmt: skip
    if (tokens.shape[1] + 1) * max(1, len(stops)) > MOST_PAIRS:
        return False, f"up to {MOST_PAIRS} pairs of a token and a stop token"
    return on_gpu(tokens)


SETTLE = Kernel(
    "specdec.settle",
    settle,
    (Implementation("torch", settle, on_cpu), Implementation("triton", _triton, _fits, triton_runs), Implementation("steps", settle)),
)
