"""Gated MLPs, down(act(gate(x)) * up(x)), of packed linears: one product for gate and up, the rest as `down` reads its input."""

from __future__ import annotations

import copy
import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .packed import ACTIVATIONS, PackedLinear, is_watched


class Names(NamedTuple):
    """Of the linears inside an MLP."""

    gate: str
    up: str
    down: str


class Gated:
    """Stands for the forward of an MLP; where its linears are joined no more, or have hooks, the MLP's own runs."""

    def __init__(self, mlp: nn.Module, names: Names, activation: str) -> None:
        self.mlp, self.names, self.activation = mlp, names, activation

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())  # the one argument of the MLP's own, by whatever name
        mlp = self.mlp
        gate, up, down = (getattr(mlp, n) for n in self.names)
        joined = gate.joined if isinstance(gate, PackedLinear) else None
        if joined is None or joined.members != (gate, up) or not isinstance(down, PackedLinear) or not x.numel() or any(is_watched(m) for m in mlp.children()):
            plain: Tensor = type(mlp).forward(mlp, x)
            return plain
        y = joined(x)
        return down.multiply(down.prepare_gated(y.view(-1, y.shape[-1]), self.activation)).view(*x.shape[:-1], down.out_features)


def gate(mlp: nn.Module, names: Names, dtype: torch.dtype) -> None:
    """Let an MLP whose linears are packed, gate and up joined, run so, if that is what it computes."""
    linears = [mlp.get_submodule(n) for n in names]
    joined = linears[0].joined if isinstance(linears[0], PackedLinear) else None
    if joined is None or joined.members != tuple(linears[:2]) or not isinstance(linears[2], PackedLinear) or "forward" in vars(mlp):
        return
    activation = activation_of(mlp, names, linears[2].in_features, dtype)
    if activation is not None:
        mlp.forward = Gated(mlp, names, activation)


def activation_of(mlp: nn.Module, names: Names, width: int, dtype: torch.dtype) -> str | None:
    """Key of `ACTIVATIONS` by which a module is down(act(gate(x)) * up(x)) to the bit, tried with stand-ins for its linears.

    Args:
        width: of what `down` reads.
        dtype: of the model; fp32 is tried too, as it tells like activations from each other.
    """
    others = [m for n, m in mlp.named_children() if n not in names]
    held = [*mlp.parameters(recurse=False), *mlp.buffers(recurse=False), *(t for m in others for t in (*m.parameters(), *m.buffers()))]
    if held or len(inspect.signature(type(mlp).forward).parameters) != 2:
        return None
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(2, 1, 2, width, generator=generator) * torch.logspace(-2, 2, width)
    hidden = getattr(mlp, names.gate).in_features  # not just any: some change shapes by it
    ends = torch.randn(2, 1, 2, hidden, generator=generator)
    found = set(ACTIVATIONS)
    for kind in (torch.float32, dtype):
        (gate, up), (x, end) = spread.to(kind), ends.to(kind)
        down = _Last(end)
        stand = copy.copy(mlp)
        stand._modules = {**mlp._modules, names.gate: _Answer(x, gate), names.up: _Answer(x, up), names.down: down}
        y = type(mlp).forward(stand, x)
        same = isinstance(y, Tensor) and y.dtype == down.read.dtype == kind and y.equal(end)
        found = {n for n in found if same and down.read.equal(ACTIVATIONS[n](gate) * up)}
    return next(iter(found), None)


class _Answer(nn.Module):
    """A linear that knows one input, and has NaN for every other."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y

    def forward(self, x: Tensor) -> Tensor:
        return self.y if x is self.x else torch.full_like(self.y, torch.nan)


class _Last(nn.Module):
    """A linear that keeps what it read."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y, self.read = y, y.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.read = x
        return self.y
