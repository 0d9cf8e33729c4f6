"""Column by column rounding that moves each column's error into the columns not yet rounded (GPTQ and its kin).

Second moments of a linear's inputs x_1 .. x_n [I]: H = (2 / n) sum x x^T. Sources: Frantar et al., "GPTQ"
(2210.17323), algorithm 1; Li et al., "GPTAQ" (2504.02692), equations 15-17, for the drift term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from angelslim_core.errors import NumericError

if TYPE_CHECKING:
    from angelslim_core.parallel import Group

BLOCK = 128
# rows taken into account at once, which bounds their fp32 copies
ROWS = 1024
# round_column(column of weights [O], index of the column) -> (codes [O], the values they stand for [O])
RoundColumn = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Moments:
    """H and, with reference inputs, the drift D = (2 / n) sum (x~ - x) x^T; fp32, both [I, I]."""

    def __init__(self) -> None:
        self.rows = 0
        self._second: Tensor | None = None
        self._drift: Tensor | None = None

    def add(self, x_NI: Tensor, reference_NI: Tensor | None = None, weight_N: Tensor | None = None) -> None:
        """Take rows into account.

        Args:
            weight_N: how much the squared error of each row counts, 1 if not given.

        Raises:
            NumericError: a value is not finite.
        """
        for start in range(0, x_NI.shape[0], ROWS):
            some = slice(start, start + ROWS)
            self._add(x_NI[some].float(), None if reference_NI is None else reference_NI[some], None if weight_N is None else weight_N[some])

    def _add(self, x: Tensor, reference_NI: Tensor | None, weight_N: Tensor | None) -> None:
        if not bool(torch.isfinite(x.sum())):
            raise NumericError(30, "calibration", "met an activation that is not finite", "calibrate in a wider dtype, or check the model")
        self.rows += x.shape[0]
        if self._second is None:
            self._second = x.new_zeros(x.shape[1], x.shape[1])
        weighted = x if weight_N is None else x * weight_N[:, None]
        self._second.addmm_(weighted.T, x)
        if reference_NI is not None:
            if self._drift is None:
                self._drift = torch.zeros_like(self._second)
            self._drift.addmm_((reference_NI.float() - x).T, weighted)

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
                self._drift = group.reduce(nothing if self._drift is None else self._drift)

    @property
    def hessian(self) -> Tensor:
        """H."""
        assert self._second is not None
        return self._second * (2 / self.rows)

    @property
    def drift(self) -> Tensor | None:
        """D, or None where no reference was given."""
        return None if self._drift is None else self._drift * (2 / self.rows)


def inverse_factor(hessian_II: Tensor, damping: float) -> tuple[Tensor, int]:
    """Upper U with U^T U = H^-1 after damping, and how often damping was raised; H is overwritten.

    Dead inputs (H_ii = 0) get H_ii = 1. `damping` times the mean of the diagonal is added to it, and again after each
    failure of Cholesky's factorization.

    Raises:
        NumericError: ten times were not enough.
    """
    diagonal = hessian_II.diagonal()
    diagonal[diagonal == 0] = 1
    step = damping * float(diagonal.mean())
    for attempt in range(11):
        diagonal += step
        factor, failed = torch.linalg.cholesky_ex(hessian_II)
        if not int(failed):
            factor = torch.cholesky_inverse(factor)  # a name at a time, so that each is freed for the next
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not int(failed) and bool(torch.isfinite(factor).all()):
                return factor, attempt
    raise NumericError(31, "Hessian", "is not positive definite, however damped", "use more or other calibration samples")


class Compensated(NamedTuple):
    """Outcome of `compensate`.

    Args:
        codes: [O, I].
        before: [O, I] fp32, each column as it stood when it was rounded; rounding it to nearest gives `codes`.
        raised: how often damping was raised.
    """

    codes: Tensor
    before: Tensor
    raised: int


def compensate(
    weight_OI: Tensor, hessian_II: Tensor, round_column: RoundColumn, *, damping: float = 0.01, act_order: bool = True, drift_II: Tensor | None = None
) -> Compensated:
    """Round a weight so that its outputs on the calibration inputs stay close.

    Args:
        weight_OI: any float dtype.
        act_order: columns of large H_ii first; scales stay those of the columns' own groups.
        drift_II: also make up for inputs that differ from the reference's; zero gives the result without it.
    """
    columns = weight_OI.shape[1]
    diagonal = hessian_II.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(columns, device=weight_OI.device)
    work = weight_OI.float().T[order].contiguous()  # one row per input: columns of the weight lie together
    work[diagonal[order] == 0] = 0
    upper, raised = inverse_factor(hessian_II[order[:, None], order], damping)
    pull = None
    if drift_II is not None:
        pull = torch.triu(drift_II[order][:, order] @ upper.T, 1) @ upper
    codes: list[Tensor] = []
    places = order.tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = work[start:stop], torch.empty_like(work[start:stop])
        u = upper[start:stop, start:stop]
        for i in range(stop - start):
            column = block[i]
            code, value = round_column(column, places[start + i])
            codes.append(code)
            errors[i] = (column - value) / u[i, i]
            if i + 1 < stop - start:
                block[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
                if pull is not None:
                    block[i + 1 :].addr_(pull[start + i, start + i + 1 : stop], column)
        if stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
            if pull is not None:
                work[stop:].addmm_(pull[start:stop, stop:].T, block)
    back = torch.argsort(order)
    return Compensated(torch.stack(codes)[back].T.contiguous(), work[back].T.contiguous(), raised)
