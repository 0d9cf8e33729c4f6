"""Linears that run on codes as they are stored; plugins bring the classes, `loading` puts them into a model.

Shapes: N rows of the input, O out features, I in features.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import EngineError

if TYPE_CHECKING:
    from .schemes import Quantized, Scheme


class PackedLinear(nn.Module):
    """y = x W^T + b, where W stays in its codes and scales.

    A subclass says in `supports` what it runs, keeps in `pack` what it needs as buffers, and computes in `prepare` and
    `multiply`. Nothing in there may wait for a GPU or depend on values, so that CUDA graphs can record it.

    Args:
        quantized: the weight, on the device where the linear will run.
        bias: [O], or None.
        dtype: of inputs and outputs.

    Attributes:
        name: of the executor, for `Loaded.backend`.
        prepares: what `prepare` makes of an input; linears of one layer with equal ones prepare a shared input once. None: nothing to share.
        shared: set by the loader.

    Raises:
        EngineError: on a call that asks for gradients, on saving, and on a change of dtype.
    """

    name: str
    prepares: Hashable = None
    shared: SharedInput | None = None

    def __init__(self, quantized: Quantized, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.codes.shape
        self.dtype = dtype
        self.bias = bias
        self.pack(quantized)

    @classmethod
    def supports(cls, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[bool, str]:
        """Whether it runs linears of a scheme and shape (O, I); if not, why."""
        raise NotImplementedError

    @classmethod
    def pays(cls, scheme: Scheme, dtype: torch.dtype, device: str) -> bool:
        """Whether it was measured to be faster than the dequantized linear there."""
        return device != "cpu"

    def pack(self, quantized: Quantized) -> None:
        """Keep codes and scales, in whatever order the kernels read them, by `keep`."""
        raise NotImplementedError

    def prepare(self, x: Tensor) -> Any:
        """What `multiply` gets for an input [..., I]; here its rows [N, I]."""
        return x.reshape(-1, self.in_features)

    def multiply(self, prepared: Any) -> Tensor:
        """[N, O] in `dtype`, bias included."""
        raise NotImplementedError

    def keep(self, name: str, tensor: Tensor | None) -> None:
        """Hold a tensor that moves with the model."""
        self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise EngineError(420, self.name, "packed linears have no gradients", "load(..., packed=False) dequantizes them")
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        shared = self.shared
        y = self.multiply(self.prepare(x) if shared is None else shared(x, self.prepares, self.prepare))
        return y.view(*x.shape[:-1], self.out_features)

    def packed_bytes(self) -> int:
        """Bytes it holds."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.name}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise EngineError(421, prefix.rstrip("."), "packed linears cannot be saved", "copy the folder, or load(..., packed=False)")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        changed = next((n for n, b in self.named_buffers() if fn(b.flatten()[:0]).dtype != b.dtype), None)
        if changed is not None:  # codes are no numbers that a cast keeps
            raise EngineError(422, changed, "packed linears keep their dtype", "load(..., packed=False) dequantizes them")
        return super()._apply(fn, recurse)


class SharedInput:
    """The last input that linears of one layer prepared, kept while the layer runs: q, k and v quantize it once.

    Outside of the layer's forward nothing is kept, so that a CUDA graph never relies on work it did not record. An input
    is known by being the same tensor object, unchanged since.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._running = False
        self._last: tuple[weakref.ref[Tensor], int, Hashable, Any] | None = None
        self.handles = layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end, always_call=True)

    def __call__(self, x: Tensor, kind: Hashable, prepare: Callable[[Tensor], Any]) -> Any:
        """`prepare(x)`, or what it returned for the same `x` and `kind` just before."""
        if not self._running or kind is None or x.is_inference():  # inference tensors do not tell that they were changed
            return prepare(x)
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version and last[2] == kind:
            return last[3]
        found = prepare(x)
        self._last = (weakref.ref(x), x._version, kind, found)
        return found

    def _begin(self, *_: Any) -> None:
        self._running, self._last = True, None

    def _end(self, *_: Any) -> None:
        self._running, self._last = False, None


class Hole(nn.Module):
    """Where a packed linear will be while its model is loaded; it has the linear's bias only."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias
