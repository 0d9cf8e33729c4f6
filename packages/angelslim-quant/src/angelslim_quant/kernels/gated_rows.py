"""What a gated MLP's last linear reads, act(gate) * up, as codes: activation, product and `quantize_rows` in one pass."""

from __future__ import annotations

from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.packed import ACTIVATIONS
from angelslim_core.schemes import Grid

from . import quantize_rows


def reference(x_N2F: Tensor, activation: str, grid: Grid | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Codes [N, F] and scales as `quantize_rows` returns them; without a grid the numbers, and None.

    Activation and product are rounded to the dtype of the input one after the other, as modules of a model round them.

    Args:
        x_N2F: gate and up beside each other.
        activation: key of `ACTIVATIONS`.
        grid: as for `quantize_rows`, or None.
        scale: as for `quantize_rows`.
    """
    gate_NF, up_NF = x_N2F.chunk(2, 1)
    product = ACTIVATIONS[activation](gate_NF).mul_(up_NF)
    return (product, None) if grid is None else quantize_rows.reference(product, grid, scale)


def _triton(x_N2F: Tensor, activation: str, grid: Grid | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    from .triton.quantize_rows import gated_rows

    return gated_rows(x_N2F, activation, grid, scale)


def _fits(x_N2F: Tensor, activation: str, grid: Grid | None = None, scale: Tensor | None = None) -> tuple[bool, str]:
    return (x_N2F.is_cuda, "on a GPU") if grid is None else quantize_rows.fits(x_N2F[:, ::2], grid, scale)


GATED_ROWS = Kernel("quant.gated_rows", reference, (Implementation("triton", _triton, _fits, triton_runs), Implementation("torch", reference)))
