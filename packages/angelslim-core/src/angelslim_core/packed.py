"""Linears that run on codes as they are stored; plugins bring the classes, `loading` puts them into a model.

Shapes: N rows of the input, O out features, I in features.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import EngineError

if TYPE_CHECKING:
    from .schemes import Quantized, Scheme


# name -> act of an MLP down(act(gate(x)) * up(x)) that `prepare_gated` is asked for
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"silu": nn.functional.silu, "gelu_tanh": partial(nn.functional.gelu, approximate="tanh")}
)  # fmt: skip


def _normed(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# name -> an RMSNorm of x, its weight and eps, rounded where the modules of transformers round, that `prepare_normed` is asked for
NORMS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = MappingProxyType(
    {
        "weight": lambda x, weight, eps: weight * _normed(x, eps).to(x.dtype),
        "one_plus_weight": lambda x, weight, eps: (_normed(x, eps) * (1.0 + weight.float())).to(x.dtype),
    }
)


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
        unit: linears with outputs in multiples of this can run as one (see `join`); 0: they cannot.
        shared: set by the loader.
        joined: the linear that computes this one's outputs and those of others, from row `start` of it on; set by `join`.
        members: the linears it was joined from; set by `join`.

    Raises:
        EngineError: on a call that asks for gradients, on saving, and on a change of dtype.
    """

    name: str
    prepares: Hashable = None
    unit: int = 0
    shared: SharedInput | None = None
    joined: PackedLinear | None = None
    start: int = 0
    members: Sequence[PackedLinear] = ()

    def __init__(self, quantized: Quantized, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.codes.shape
        self.dtype = dtype
        self.bias = bias
        self._axes: dict[str, int | None] = {}
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

    def prepare_gated(self, x_N2I: Tensor, activation: str) -> Any:
        """What `multiply` gets for act(gate) * up, both rounded to `dtype`, of gate and up beside each other; the act is one of `ACTIVATIONS`."""
        gate_NI, up_NI = x_N2I.chunk(2, 1)
        return self.prepare(ACTIVATIONS[activation](gate_NI) * up_NI)

    def prepare_normed(self, x_NI: Tensor, weight_I: Tensor, eps: float, norm: str) -> tuple[Tensor, Any]:
        """The norm of rows, by a key of `NORMS`, and what `prepare` makes of it."""
        y_NI = NORMS[norm](x_NI, weight_I, eps)
        return y_NI, self.prepare(y_NI)

    def multiply(self, prepared: Any) -> Tensor:
        """[N, O] in `dtype`, bias included."""
        raise NotImplementedError

    def keep(self, name: str, tensor: Tensor | None, rows: int | None = None) -> None:
        """Hold a tensor that moves with the model.

        Args:
            rows: the axis along which it lies by outputs, so that those of joined linears follow one another. None: it is of all outputs.
        """
        self._axes[name] = rows
        self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise EngineError(420, self.name, "packed linears have no gradients", "load(..., packed=False) dequantizes them")
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        shared, joined = self.shared, self.joined
        y = None if shared is None or joined is None else shared.outputs(x, joined, self)
        if y is None:
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
        changed = next((n for n, b in self.named_buffers() if fn(b.new_empty(0)).dtype != b.dtype), None)
        if changed is not None:  # codes are no numbers that a cast keeps
            raise EngineError(422, changed, "packed linears keep their dtype", "load(..., packed=False) dequantizes them")
        if self.joined is None:
            return super()._apply(fn, recurse)
        self.joined._apply(fn, recurse)
        self.joined._hand_out()
        return self

    def _kind(self) -> tuple[Any, ...]:
        """Alike in linears that can be joined."""
        held = {**self._buffers, "bias": self.bias}
        shapes = [(n, t if t is None else (t.dtype, t.device, *t.transpose(0, self._axes.get(n) or 0).shape[1:])) for n, t in held.items()]
        return type(self), self.name, self.unit, self.prepares, self.in_features, self.dtype, *shapes

    def _hand_out(self) -> None:
        """Let the members hold views of what they share."""
        at: Counter[str] = Counter()
        for member in self.members:
            for name, whole in self._buffers.items():
                axis, own = self._axes[name], member._buffers[name]
                if whole is None or own is None or axis is None:
                    member._buffers[name] = whole
                else:
                    member._buffers[name] = whole.narrow(axis, at[name], own.shape[axis])
                    at[name] += own.shape[axis]
            if self.bias is not None:
                member.bias = nn.Parameter(self.bias.narrow(0, at["bias"], member.out_features), requires_grad=False)
                at["bias"] += member.out_features


def join(linears: Sequence[PackedLinear]) -> PackedLinear | None:
    """Let linears that read one input run as one, so that a GPU gets one large product instead of some small ones.

    The linear returned holds their rows, one after another; each of `linears` becomes a view of its own and asks it for
    its outputs while a layer runs. A tensor at a time is there twice.

    Returns:
        None where they do not fit each other: nothing is changed.
    """
    first = linears[0]
    alike = all(m._kind() == first._kind() for m in linears[1:]) and first.unit > 0 and not any(m.out_features % m.unit for m in linears[:-1])
    common = [n for n, t in first._buffers.items() if t is not None and first._axes[n] is None]
    if len(linears) < 2 or not alike or any(not torch.equal(m.get_buffer(n), first.get_buffer(n)) for n in common for m in linears[1:]):
        return None
    joined = type(first).__new__(type(first))
    nn.Module.__init__(joined)
    vars(joined).update({k: v for k, v in vars(first).items() if k not in vars(joined)}, members=tuple(linears))
    joined.out_features = sum(m.out_features for m in linears)
    joined.bias = None if first.bias is None else nn.Parameter(torch.cat([m.get_parameter("bias") for m in linears]), requires_grad=False)
    for name, axis in first._axes.items():
        own = first._buffers[name]
        joined.keep(name, own if own is None or axis is None else torch.cat([m.get_buffer(name) for m in linears], axis), axis)
        joined._hand_out()
    start = 0
    for member in linears:
        vars(member).update(joined=joined, start=start)  # not as a child: modules and tensors of the model stay those of its linears
        start += member.out_features
    return joined


class SharedInput:
    """What linears of one layer made of their last input, kept while the layer runs: q, k and v quantize it once, and are one product.

    Outside of the layer's forward nothing is kept, so that a CUDA graph never relies on work it did not record. An input
    is known by being the same tensor object, unchanged since.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._running = False
        self._last: tuple[weakref.ref[Tensor], int, Hashable, Any] | None = None
        self._outputs: dict[PackedLinear, tuple[weakref.ref[Tensor], int, Tensor, list[PackedLinear]]] = {}
        self.handles = layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end, always_call=True)

    def __call__(self, x: Tensor, kind: Hashable, prepare: Callable[[Tensor], Any]) -> Any:
        """`prepare(x)`, or what it returned for the same `x` and `kind` just before."""
        if kind is None or not self.keeps(x):
            return prepare(x)
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version and last[2] == kind:
            return last[3]
        found = prepare(x)
        self.give(x, kind, found)
        return found

    def give(self, x: Tensor, kind: Hashable, prepared: Any) -> None:
        """Know what `prepare` makes of `x`, for whoever asks next."""
        if kind is not None and self.keeps(x):
            self._last = (weakref.ref(x), x._version, kind, prepared)

    def outputs(self, x: Tensor, joined: PackedLinear, member: PackedLinear) -> Tensor | None:
        """A member's columns [N, O] of what `joined` makes of `x`; None where nothing can be kept for the other members."""
        if not self.keeps(x) or joined.shared is None:
            return None
        last = self._outputs.get(joined)
        if last is None or last[0]() is not x or last[1] != x._version or member not in last[3]:
            if last is not None:  # members that read different inputs had better run alone
                joined.shared = None
                self._outputs.pop(joined, None)  # another thread may have ended the layer
                return None
            last = (weakref.ref(x), x._version, joined.multiply(self(x, joined.prepares, joined.prepare)), [*joined.members])
            self._outputs[joined] = last
        waiting = last[3]
        waiting.remove(member)
        if not waiting:
            self._outputs.pop(joined, None)
        return last[2].narrow(1, member.start, member.out_features)

    def keeps(self, x: Tensor) -> bool:
        """Whether it remembers what is made of `x`."""
        # inference tensors do not tell that they were changed
        return self._running and not torch.compiler.is_compiling() and not x.is_inference()

    def _begin(self, *_: Any) -> None:
        self._running = True
        self._clear()

    def _end(self, *_: Any) -> None:
        self._running = False
        self._clear()

    def _clear(self) -> None:
        self._last = None
        self._outputs.clear()


def is_watched(module: nn.Module) -> bool:
    """Whether something waits for its calls or replaces them."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


class Hole(nn.Module):
    """Where a packed linear will be while its model is loaded; it has the linear's bias only."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias
