"""An RMSNorm and the codes of what it returns, as the linears that read it want them: the norm and `quantize_rows` in one pass."""

from __future__ import annotations

from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.packed import NORMS
from angelslim_core.schemes import Grid

from . import quantize_rows


def reference(
    x_NI: Tensor, weight_I: Tensor, eps: float, norm: str, grid: Grid | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The norm [N, I], its codes and their scales as `quantize_rows` returns them; without a grid the norm twice, and None.

    The norm is rounded to the dtype of the input where modules of a model round it.

    Args:
        norm: key of `NORMS`.
        grid: as for `quantize_rows`, or None.
        scale: as for `quantize_rows`.
    """
    y = NORMS[norm](x_NI, weight_I, eps)
    return (y, y, None) if grid is None else (y, *quantize_rows.reference(y, grid, scale))


def _triton(
    x_NI: Tensor, weight_I: Tensor, eps: float, norm: str, grid: Grid | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    from .triton.quantize_rows import normed_rows

    return normed_rows(x_NI, weight_I, eps, norm, grid, scale)


def _fits(x_NI: Tensor, weight_I: Tensor, eps: float, norm: str, grid: Grid | None = None, scale: Tensor | None = None) -> tuple[bool, str]:
    ok, why = (x_NI.is_cuda, "on a GPU") if grid is None else quantize_rows.fits(x_NI, grid, scale)
    return ok and x_NI.shape[1] <= 32768, f"{why}; rows up to 32768 wide"


NORMED_ROWS = Kernel("quant.normed_rows", reference, (Implementation("triton", _triton, _fits, triton_runs), Implementation("torch", reference)))
