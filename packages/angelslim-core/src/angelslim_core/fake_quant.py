"""Linears that round while a model is trained: what a `TrainedPass` puts in, and a training step trains.

What `FakeQuantizer.weight` computes is what `FakeQuantizer.quantized` stores: the reloaded linear is the trained one.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .schemes import Quantized, Scheme


class FakeQuantizer(nn.Module):
    """How one linear rounds. What is learnt of it, scales for instance, are its parameters (fp32).

    Args:
        scheme: what `quantized` will give.

    Attributes:
        trains_weight: the linear's own weight is meant to be trained along; False: it is frozen.
        progress: share of the training that is done, 0 to 1, set before each step; for what is annealed.
    """

    trains_weight: ClassVar[bool] = True

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.progress = 0.0

    def weight(self, weight_OI: Tensor) -> Tensor:
        """The rounded weight in the dtype of `weight_OI`, with gradients for it and for the scales."""
        raise NotImplementedError

    def inputs(self, x: Tensor) -> Tensor:
        """The rounded input [..., I]; by default as it comes."""
        return x

    def bias(self, weight_OI: Tensor) -> Tensor | None:
        """[O], what is added to the linear's bias, with gradient; None: nothing. It stays in the stored model as a bias."""
        return None

    def product(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The linear [..., O] as it is trained; in evaluation it must be what is stored."""
        extra = self.bias(weight_OI)
        bias = bias_O if extra is None else extra.to(x.dtype) if bias_O is None else bias_O + extra.to(bias_O.dtype)
        return nn.functional.linear(self.inputs(x), self.weight(weight_OI), bias)

    def quantized(self, weight_OI: Tensor) -> Quantized:
        """Codes and scales, of which `dequantize` gives just what `weight` gives."""
        raise NotImplementedError


class FakeQuantizedLinear(nn.Linear):
    """A linear that rounds as its quantizer says, unless `rounds` is False. Made of one by `place`."""

    quantizer: FakeQuantizer
    rounds: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds:
            return super().forward(x)
        return self.quantizer.product(x, self.weight, self.bias)


def place(linear: nn.Linear, quantizer: FakeQuantizer) -> FakeQuantizedLinear:
    """Let a linear round from now on; it stays the same module, of another class, so hooks and names stay."""
    linear.__class__ = FakeQuantizedLinear
    assert isinstance(linear, FakeQuantizedLinear)
    linear.quantizer = quantizer.to(linear.weight.device)
    linear.rounds = True
    return linear


def placed(model: nn.Module) -> dict[str, FakeQuantizedLinear]:
    """The linears that round, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantizedLinear)}


@contextmanager
def rounding_off(model: nn.Module) -> Iterator[None]:
    """Inside, linears compute with their weights as they are: a model whose weights are frozen is then its own teacher."""
    linears = placed(model).values()
    before = [linear.rounds for linear in linears]
    try:
        for linear in linears:
            linear.rounds = False
        yield
    finally:
        for linear, rounds in zip(linears, before, strict=True):
            linear.rounds = rounds


def set_progress(model: nn.Module, share: float) -> None:
    """Tell every quantizer how much of the training is done, 0 to 1."""
    for linear in placed(model).values():
        linear.quantizer.progress = share


def remove(linear: FakeQuantizedLinear) -> Quantized:
    """Make a plain linear of it again, with the rounded weight, and a bias where the quantizer gave one; returns what to store."""
    quantizer = linear.quantizer.eval()
    with torch.no_grad():
        found = quantizer.quantized(linear.weight)
        extra = quantizer.bias(linear.weight)
        linear.weight.data = found.dequantize(linear.weight.dtype)
        if extra is not None:
            total = extra if linear.bias is None else linear.bias + extra
            linear.bias = nn.Parameter(total.to(linear.weight.dtype))
    del linear.quantizer
    linear.__class__ = nn.Linear  # type: ignore[assignment]
    return found


def write_trained(workdir, trained: Mapping[str, Quantized]) -> None:  # type: ignore[no-untyped-def]
    """Keep what training left, for `read_trained`."""
    raise NotImplementedError


def read_trained(workdir, name: str, scheme: Scheme) -> Quantized:  # type: ignore[no-untyped-def]
    """Codes and scales of a linear as `write_trained` kept them."""
    raise NotImplementedError
