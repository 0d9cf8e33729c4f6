"""Logits to what is accepted and what follows: chains, greedily or by the ratio rule.

Shapes: B rows, K proposed tokens, V vocabulary, Vd columns of q.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs

from ..verification.greedy import greedy
from ..verification.ratio import ratio
from .verify_attention import on_cpu, on_gpu

if TYPE_CHECKING:
    from ..drafters.base import Warp

# a program holds what is known of all tokens of a row
MOST_TOKENS = 64


def accept_greedy(logits: Tensor, tokens: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`verification.greedy` of the most probable tokens of logits [B, K + 1, V]; of several the first."""
    return greedy(logits.argmax(-1), tokens, counts)


def accept_ratio(
    logits: Tensor, warp: Warp, tokens: Tensor, q: Tensor | None, columns: Tensor | None, uniforms: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`verification.ratio` of the probabilities that `warp` makes of logits [B, K + 1, V]."""
    return ratio(warp(logits), tokens, q, columns, uniforms, counts)


def _greedy_triton(logits: Tensor, tokens: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from .triton.accept import accept_greedy

    return accept_greedy(logits, tokens, counts)


def _ratio_triton(
    logits: Tensor, warp: Warp, tokens: Tensor, q: Tensor | None, columns: Tensor | None, uniforms: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .triton.accept import accept_ratio

    return accept_ratio(logits, warp.temperature, tokens, q, columns, uniforms, counts)


def _greedy_fits(logits: Tensor, *_: object, **__: object) -> tuple[bool, str]:
    if logits.shape[1] > MOST_TOKENS or logits.stride(-1) != 1:
        return False, f"fewer than {MOST_TOKENS} proposed tokens, logits of one beside each other"
    return on_gpu(logits)


def _ratio_fits(
    logits: Tensor, warp: Warp, tokens: Tensor, q: Tensor | None, columns: Tensor | None, uniforms: Tensor, counts: Tensor | None = None
) -> tuple[bool, str]:  # fmt: skip
    if 0 < warp.top_k < logits.shape[2] or warp.top_p < 1:
        return False, "no top_k and no top_p"
    if q is not None and (q.dtype != torch.float32 or q.stride(-1) != 1):
        return False, "q in FP32, a token's beside each other"
    return _greedy_fits(logits)


ACCEPT_GREEDY = Kernel(
    "specdec.accept_greedy",
    accept_greedy,
    (
        Implementation("torch", accept_greedy, on_cpu),
        Implementation("triton", _greedy_triton, _greedy_fits, triton_runs),
        Implementation("steps", accept_greedy),
    ),
)
ACCEPT_RATIO = Kernel(
    "specdec.accept_ratio",
    accept_ratio,
    (Implementation("torch", accept_ratio, on_cpu), Implementation("triton", _ratio_triton, _ratio_fits, triton_runs), Implementation("steps", accept_ratio)),
)
