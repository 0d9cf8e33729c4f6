"""Matrix products of half-precision models on CPUs without instructions for them.

An AVX2 machine multiplies BF16 and FP16 five times slower than fp32. There operands are widened, which is exact, and
what comes out is rounded: the same numbers but for the order of their sums.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def products(device: str) -> AbstractContextManager[Any]:
    """Inside, forward passes on a device take the faster way; not for single rows, where reading the weights takes the time."""
    return _mode() if device == "cpu" and slow_on_cpu() else nullcontext()


@cache
def slow_on_cpu() -> frozenset[torch.dtype]:
    """The half-precision dtypes that this CPU multiplies slower than fp32."""
    import torch

    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return frozenset(d for d, name in supported.items() if not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()))


def _mode() -> AbstractContextManager[Any]:
    import torch
    from torch.overrides import TorchFunctionMode

    widened = {
        torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
        *(getattr(torch.Tensor, name) for name in ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm")),
    }  # fmt: skip
    slow = slow_on_cpu()

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype in slow else value

    class Widened(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func not in widened or not args or args[0].dtype not in slow:
                return func(*args, **kwargs)
            out = func(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})
            return out.to(args[0].dtype)

    return Widened()
