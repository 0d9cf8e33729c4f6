"""Column by column rounding that moves each column's error into the columns not yet rounded (GPTQ and its kin).

Second moments of a linear's inputs x_1 .. x_n [I]: H = sum x x^T; the papers' factor 2 / n cancels. Sources: Frantar et
al., "GPTQ" (2210.17323), algorithm 1; Li et al., "GPTAQ" (2504.02692), equations 15-17, for the drift term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from angelslim_core.errors import NumericError

from ..kernels.round_columns import ROUND_COLUMNS, Steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from angelslim_core.parallel import Group

BLOCK = 128
# rows whose fp32 copies are made at once, on the CPU
ROWS = 1024
# of H that are summed at once, at least
COLUMNS = 256


class Moments:
    """H and, with reference inputs, the drift D = sum (x~ - x) x^T; fp32, both [I, I]."""

    def __init__(self) -> None:
        self.rows = 0
        self._second: Tensor | None = None
        self.drift: Tensor | None = None

    def add(self, x_NI: Tensor, reference_NI: Tensor | None = None, weight_N: Tensor | None = None) -> None:
        """Take rows into account.

        Args:
            weight_N: how much the squared error of each row counts, 1 if not given.

        Raises:
            NumericError: a value is not finite.
        """
        rows = x_NI.shape[0] if x_NI.is_cuda else ROWS
        for start in range(0, x_NI.shape[0], rows or 1):
            some = slice(start, start + rows)
            self._add(x_NI[some], None if reference_NI is None else reference_NI[some], None if weight_N is None else weight_N[some])

    def _add(self, x: Tensor, reference_NI: Tensor | None, weight_N: Tensor | None) -> None:
        self.rows += x.shape[0]
        if self._second is None:
            self._second = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        x = x if x.is_cuda and x.dtype == torch.bfloat16 else x.float()
        weighted = x if weight_N is None else x.float() * weight_N[:, None]
        for some in _blocks(x.shape[1]):  # symmetric: what lies below the diagonal's blocks is not computed
            _add_products(self._second[: some.stop, some], weighted[:, : some.stop], x[:, some])
        if reference_NI is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self._second)
            moved = reference_NI.float() - x.float()
            _add_products(self.drift, moved if weight_N is None else moved.mul_(weight_N[:, None]), x)

    def reduce(self, group: Group, columns: int, device: str, drifts: bool = False) -> None:
        """Make these the moments of all processes' rows.

        Args:
            columns: I; a process may have seen no row.
            device: where the others' moments are.
            drifts: references are given.
        """
        if group.size == 1:
            return
        self.rows = int(group.reduce(torch.tensor(self.rows)))
        if self.rows:
            nothing = torch.zeros(columns, columns, device=device)
            self._second = group.reduce(nothing.clone() if self._second is None else self._second)
            if drifts:
                self.drift = group.reduce(nothing if self.drift is None else self.drift)

    @property
    def hessian(self) -> Tensor:
        """H.

        Raises:
            NumericError: an input was not finite.
        """
        assert self._second is not None
        check_squares(self._second.diagonal())
        for some in _blocks(len(self._second)):
            block = self._second[some, some].triu()
            self._second[some, some] = block + block.triu(1).T
            self._second[some.stop :, some] = self._second[some, some.stop :].T
        return self._second


def check_squares(sums_I: Tensor) -> None:
    """Raise a NumericError if the sums of squares of what was calibrated on tell of an input that is not finite."""
    if not bool(torch.isfinite(sums_I.sum())):
        raise NumericError(30, "calibration", "met an activation that is not finite", "calibrate in a wider dtype, or check the model")


def _blocks(columns: int) -> Iterator[slice]:
    width = max(COLUMNS, columns // 8)
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def _add_products(sums: Tensor, a_NI: Tensor, x_NI: Tensor) -> None:
    """Add a^T x to fp32 sums. A GPU multiplies BF16 many times as fast, exactly, and sums in fp32; an fp32 number is two of them."""
    if x_NI.dtype == torch.float32:
        sums.addmm_(a_NI.T, x_NI)
        return
    high = a_NI.to(x_NI.dtype)
    sums += torch.mm(high.T, x_NI, out_dtype=torch.float32)
    if high is not a_NI:
        sums += torch.mm((a_NI - high).to(x_NI.dtype).T, x_NI, out_dtype=torch.float32)


def inverse_factor(hessian_II: Tensor, damping: float, order_I: Tensor) -> tuple[Tensor, int]:
    """Upper U with U^T U = H^-1, rows and columns in an order, after damping; and how often damping was raised.

    Dead inputs (H_ii = 0) get H_ii = 1. `damping` times the mean of the diagonal is added to it, and again after each
    failure of Cholesky's factorization. With rows and columns in reverse H = L L^T, and U is the inverse of L, reversed.

    Raises:
        NumericError: ten times were not enough.
    """
    backwards = order_I.flip(0)
    diagonal = hessian_II.diagonal()[backwards]
    diagonal[diagonal == 0] = 1
    step = damping * float(diagonal.mean())
    for attempt in range(11):
        factor = hessian_II[backwards[:, None], backwards].T  # columns lie together: LAPACK then works in place
        factor.diagonal().copy_(diagonal.add_(step))
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not int(failed):
            one = torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
            factor = torch.linalg.solve_triangular(factor, one, upper=False, out=one)
            if bool(torch.isfinite(factor).all()):
                return factor.flip(0, 1), attempt
    raise NumericError(31, "Hessian", "is not positive definite, however damped", "use more or other calibration samples")


class Compensated(NamedTuple):
    """Outcome of `compensate`.

    Args:
        levels: [O, I] fp32, element values as `Steps` has them.
        before: [O, I] fp32, each column as it stood when it was rounded; rounding it to nearest gives `levels`.
        raised: how often damping was raised.
    """

    levels: Tensor
    before: Tensor
    raised: int


def compensate(
    weight_OI: Tensor,
    hessian_II: Tensor,
    steps: Steps,
    group_size: int | None,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    drift_II: Tensor | None = None,
) -> Compensated:
    """Round a weight so that its outputs on the calibration inputs stay close.

    Args:
        weight_OI: any float dtype.
        steps: the values that may be taken.
        group_size: inputs that share a scale; all do if None.
        act_order: columns of large H_ii first; scales stay those of the columns' own groups.
        drift_II: also make up for inputs that differ from the reference's; zero gives the result without it.
    """
    columns = weight_OI.shape[1]
    diagonal = hessian_II.diagonal()
    places = torch.arange(columns, device=weight_OI.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else places
    group_I = (order // (group_size or columns)).int()
    work = weight_OI.float().T[order].contiguous()  # one row per input: columns of the weight lie together
    work[diagonal[order] == 0] = 0
    upper, raised = inverse_factor(hessian_II, damping, order)
    pull = None
    if drift_II is not None:
        pull = torch.triu(drift_II[order][:, order] @ upper.T, 1) @ upper
    levels = torch.empty_like(work)
    for start in range(0, columns, BLOCK):
        some, after = slice(start, start + BLOCK), slice(start + BLOCK, columns)
        levels[some], errors = ROUND_COLUMNS(work[some], upper[some, some], None if pull is None else pull[some, some], steps, group_I[some])
        if after.start < columns:
            work[after].addmm_(upper[some, after].T, errors, alpha=-1)
            if pull is not None:
                work[after].addmm_(pull[some, after].T, work[some])
    back = torch.argsort(order)
    return Compensated(levels[back].T.contiguous(), work[back].T.contiguous(), raised)
