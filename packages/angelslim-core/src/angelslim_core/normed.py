"""RMSNorms that packed linears read: one pass gives what the norm returns and what its readers make of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .packed import NORMS, PackedLinear, is_watched


class Normed:
    """Stands for the forward of a norm; where nobody would use what it prepares, or gradients are asked for, the norm's own runs.

    Args:
        kind: key of `NORMS`.
        eps: name of the norm's attribute.
    """

    def __init__(self, norm: nn.Module, readers: Sequence[PackedLinear], kind: str, eps: str) -> None:
        self.norm, self.readers, self.kind, self.eps = norm, tuple(readers), kind, eps

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())  # the one argument of the norm's own, by whatever name
        norm, reader = self.norm, self.readers[0]
        weight = norm.weight
        assert isinstance(weight, Tensor)
        fits = x.dtype == weight.dtype == reader.dtype and x.device == weight.device and x.shape[-1:] == weight.shape and x.numel()
        learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        shared = reader.shared
        keeps = not torch.compiler.is_compiling() if reader.prepares is None else shared is not None and shared.keeps(x)
        # squares that do not lie side by side are summed in another order
        if not fits or x.stride(-1) != 1 or learns or not keeps or any(is_watched(m) for m in self.readers):
            plain: Tensor = type(norm).forward(norm, x)
            return plain
        rows, prepared = reader.prepare_normed(x.reshape(-1, x.shape[-1]).contiguous(), weight, getattr(norm, self.eps), self.kind)
        y = rows.view(x.shape)
        if shared is not None:
            shared.give(y, reader.prepares, prepared)
        return y


def join_norm(norm: nn.Module, readers: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Let a norm run so, if all that reads it is packed, with inputs prepared alike, and if it computes one of `NORMS`."""
    packed = [m for m in readers if isinstance(m, PackedLinear)]
    if not packed or len(packed) < len(readers) or len({(type(m), m.prepares, m.dtype, m.shared) for m in packed}) > 1 or "forward" in vars(norm):
        return
    if packed[0].prepares is None and type(packed[0]).prepare_normed is PackedLinear.prepare_normed:  # what it prepares is kept for nobody
        return
    found = norm_of(norm, packed[0].in_features, dtype, next(packed[0].buffers()).device)
    if found is not None:
        norm.forward = Normed(norm, packed, *found)


def norm_of(norm: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> tuple[str, str] | None:
    """Key of `NORMS` that a module computes to the bit, and the name of its attribute that holds eps, tried with a weight of random numbers.

    Args:
        width: of what it norms.
        dtype: of the model; fp32 is tried too.
        device: where it will run, as fused norms round otherwise on GPUs.
    """
    held = {n: t.shape for n, t in (*norm.named_parameters(), *norm.named_buffers())}
    if held != {"weight": (width,)} or len(inspect.signature(type(norm).forward).parameters) != 2:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, generator=generator).to(device)
    x = (torch.randn(2, 4, width, generator=generator) * torch.logspace(-5, 1, 4)[:, None]).to(device)  # eps counts in some rows
    found = {(kind, name) for kind in NORMS for name, value in vars(norm).items() if type(value) is float}
    for rounded in (torch.float32, dtype):
        stand = copy.copy(norm)
        stand._parameters = {"weight": nn.Parameter(weight.to(rounded), requires_grad=False)}
        given = x.to(rounded)
        wanted = {f: NORMS[f[0]](given, weight.to(rounded), vars(norm)[f[1]]) for f in found}
        y = type(norm).forward(stand, given)
        found = {f for f in found if isinstance(y, Tensor) and y.dtype == rounded and y.equal(wanted[f]) and given.equal(x.to(rounded))}
    return min(found, default=None)
