"""Muon: momentum of a matrix, made orthogonal, is its step.

torch's own takes the matrices one by one, some twenty small launches each; here those of one shape are stepped together.

Source: Jordan et al., "Muon" (2024), five Newton-Schulz steps of fifth order; Liu et al. (2502.16982), section 2.2: an update is of the size that
AdamW's is, so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# of x -> a x + b (x x^T) x + c (x x^T)^2 x, whose slope at 0 is large: singular values come near 1, between .7 and 1.2, not to it
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# root mean square of an update, in learning rates
SIZE = 0.2
# numbers in matrices that are stepped together, of which a step makes several copies: of all matrices these would be larger than the fp32 weights
TOGETHER = 1 << 26


class Muon(torch.optim.Optimizer):
    """Steps of matrices [O, I] by orthogonal updates.

    Args:
        params: parameters, or groups of them, of two dimensions, fp32.
        lr: learning rate; the root mean square of an update is a fifth of it.
        momentum: share of the mean of gradients that stays; the step looks ahead (Nesterov).
        weight_decay: of the learning rate, taken off weights before a step.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here evaluates a loss
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for alike in shapes.values():
                most = max(1, TOGETHER // alike[0].numel())
                for start in range(0, len(alike), most):
                    self._step(group, alike[start : start + most])

    def _step(self, group: Mapping[str, Any], alike: list[Tensor]) -> None:
        gradients = [p.grad for p in alike if p.grad is not None]
        means = [self._mean(p) for p in alike]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, means, group["momentum"]))
        update = orthogonal(ahead).to(ahead.dtype)
        if group["weight_decay"]:
            torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(alike, list(update.unbind()), alpha=-group["lr"] * SIZE * max(alike[0].shape) ** 0.5)

    def _mean(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        found: Tensor = state["momentum_buffer"]
        return found


def orthogonal(x: Tensor) -> Tensor:
    """Matrices [N, O, I] with singular values near 1 in place of their own, bf16."""
    a, b, c = COEFFICIENTS
    y = x.bfloat16()
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
