"""Streaming statistics over rows x [N, I] of activations, padding left out; fp32.

`AbsMax` and `Histogram` give bit for bit the same result however the rows are ordered and cut into calls.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

from ..errors import NumericError

if TYPE_CHECKING:
    from torch import Tensor

    from ..parallel import Group

Strategy = Literal["tensor", "channel", "group"]


class Observer(ABC):
    """Sees rows, answers with the largest magnitude worth representing."""

    def __init__(self) -> None:
        self.rows = 0

    def observe(self, x_NI: Tensor) -> None:
        """Take rows into account; no rows change nothing.

        Args:
            x_NI: [..., I], any float dtype.

        Raises:
            NumericError: a value is not finite.
        """
        if x_NI.numel() == 0:
            return
        x_NI = x_NI.detach().reshape(-1, x_NI.shape[-1])
        # in the dtype it came in: a maximum is exact and passes NaN on
        columns = x_NI.abs().amax(0).float()
        if not bool(columns.isfinite().all()):
            bad = int((~columns.isfinite()).nonzero()[0])
            raise NumericError(60, f"column {bad}", "calibration met an activation that is not finite", "calibrate in a wider dtype, or check the model")
        self.rows += x_NI.shape[0]
        self._update(x_NI, columns)

    def result(self) -> Tensor:
        """The range, fp32: [1] per tensor, [I] per channel, [ceil(I / group_size)] per group.

        Raises:
            NumericError: no row was seen.
        """
        if not self.rows:
            raise NumericError(61, type(self).__name__, "calibration showed it no token", "use more calibration samples")
        return self._result()

    @abstractmethod
    def reduce(self, group: Group, columns: int) -> None:
        """Make this what one observer of all processes' rows would be.

        Args:
            columns: I; a process may have seen no row.
        """

    def _reduce_rows(self, group: Group) -> None:
        import torch

        self.rows = int(group.reduce(torch.tensor(self.rows)))

    @abstractmethod
    def _update(self, x_NI: Tensor, columns: Tensor) -> None:
        """Take finite rows and their absmax per column [I] into account."""

    @abstractmethod
    def _result(self) -> Tensor: ...


class AbsMax(Observer):
    """Largest magnitude per tensor, per column, or per group of neighbouring columns (the last may be short).

    Args:
        strategy: what shares a maximum.
        group_size: columns per group.
    """

    def __init__(self, strategy: Strategy = "tensor", group_size: int | None = None) -> None:
        super().__init__()
        if strategy == "group" and not group_size:
            raise ValueError("strategy group needs a group_size")
        self.strategy, self.group_size = strategy, group_size
        self._columns: Tensor | None = None

    def merge(self, other: AbsMax) -> None:
        """Add what another observer of the same input saw."""
        if other._columns is not None:
            self.rows += other.rows
            self._take(other._columns)

    def reduce(self, group: Group, columns: int) -> None:
        import torch

        self._reduce_rows(group)
        if self.rows:
            self._columns = group.reduce(torch.zeros(columns) if self._columns is None else self._columns.cpu(), "max")

    def _update(self, x_NI: Tensor, columns: Tensor) -> None:
        self._take(columns)

    def _take(self, columns: Tensor) -> None:
        self._columns = columns.clone() if self._columns is None else self._columns.maximum(columns.to(self._columns.device))

    def _result(self) -> Tensor:
        import torch

        assert self._columns is not None
        if self.strategy == "tensor":
            return self._columns.amax().reshape(1)
        if self.strategy == "channel" or not self.group_size:
            return self._columns.clone()
        padding = -self._columns.numel() % self.group_size
        return torch.nn.functional.pad(self._columns, (0, padding)).view(-1, self.group_size).amax(-1)


class Groupwise(AbsMax):
    """Largest magnitude per group of 128 neighbouring columns, or another `group_size`."""

    def __init__(self, group_size: int = 128) -> None:
        super().__init__("group", group_size)


class EMA(Observer):
    """Per-tensor absmax of each call, smoothed: m = b m + (1 - b) absmax, result m / (1 - b^calls).

    It depends on the order of the calls and on what each holds. Processes that take turns, as in the layer sweep, reduce
    to what one process computes.
    """

    def __init__(self, momentum: float = 0.98) -> None:
        super().__init__()
        self.momentum = momentum
        self._calls: list[float] = []

    def reduce(self, group: Group, columns: int) -> None:
        self._reduce_rows(group)
        turns = itertools.zip_longest(*group.gather(self._calls))
        self._calls = [call for turn in turns for call in turn if call is not None]

    def _update(self, x_NI: Tensor, columns: Tensor) -> None:
        self._calls.append(float(columns.max()))

    def _result(self) -> Tensor:
        import torch

        mean = 0.0
        for call in self._calls:
            mean = self.momentum * mean + (1 - self.momentum) * call
        return torch.tensor([mean / (1 - self.momentum ** len(self._calls))], dtype=torch.float32)


class Histogram(Observer):
    """Quantile of |x| per tensor, from 2048 equal bins over [0, 2^k).

    The range only ever doubles, which merges neighbouring bins exactly, so counts do not depend on what came first.

    Args:
        quantile: what `result` returns, 0..1.
    """

    BINS = 2048
    # values below 2^-100 share the first bin: the width 2^-111 is still a normal fp32 number
    _SMALLEST = -100
    # values counted at once, to bound the memory of their bin numbers
    _CHUNK = 1 << 22

    def __init__(self, quantile: float = 0.9999) -> None:
        import torch

        super().__init__()
        self.target = quantile
        self._exponent = self._SMALLEST
        self._counts = torch.zeros(self.BINS, dtype=torch.int64)
        self._max = 0.0

    def merge(self, other: Histogram) -> None:
        """Add what another histogram saw."""
        exponent = max(self._exponent, other._exponent)
        self._counts = _widen(self._counts, exponent - self._exponent) + _widen(other._counts, exponent - other._exponent)
        self._exponent, self._max, self.rows = exponent, max(self._max, other._max), self.rows + other.rows

    def reduce(self, group: Group, columns: int) -> None:
        import torch

        self._reduce_rows(group)
        widest, self._max = group.reduce(torch.tensor([self._exponent, self._max], dtype=torch.float64), "max").tolist()
        self._counts = group.reduce(_widen(self._counts, int(widest) - self._exponent))
        self._exponent = int(widest)

    def quantile(self, p: float) -> Tensor:
        """The p-quantile of |x| [1], within one bin of the exact one (ranks as torch.quantile interpolates them).

        Raises:
            NumericError: no row was seen.
        """
        import torch

        if not self.rows:
            raise NumericError(62, type(self).__name__, "calibration showed it no token", "use more calibration samples")
        if not 0 <= p <= 1:
            raise ValueError(f"a quantile is within 0..1, not {p}")
        rank = p * (int(self._counts.sum()) - 1)
        low, high = self._value(math.floor(rank)), self._value(math.ceil(rank))
        return torch.tensor([low + (high - low) * (rank - math.floor(rank))], dtype=torch.float32)

    def _update(self, x_NI: Tensor, columns: Tensor) -> None:
        import torch

        peak = float(columns.max())
        exponent = max(self._exponent, math.frexp(peak)[1])
        self._counts = _widen(self._counts, exponent - self._exponent)
        self._exponent, self._max = exponent, max(self._max, peak)
        per_width = 2.0 ** (11 - exponent)  # a power of two: the product is exact, and below 2^11
        for part in torch.split(x_NI.reshape(-1), self._CHUNK):
            numbers = (part.abs().float() * per_width).to(torch.int32)
            self._counts += torch.bincount(numbers, minlength=self.BINS).cpu()

    def _result(self) -> Tensor:
        return self.quantile(self.target)

    def _value(self, rank: int) -> float:
        """About the value of that rank (from 0, ascending): the values of a bin are taken as evenly spread."""
        import torch

        cumulative = self._counts.cumsum(0)
        if rank >= int(cumulative[-1]) - 1:
            return self._max
        number = int(torch.searchsorted(cumulative, rank, right=True))
        count = int(self._counts[number])
        inside = (rank - (int(cumulative[number]) - count) + 0.5) / count
        return min(self._max, (number + inside) * 2.0 ** (self._exponent - 11))


def _widen(counts: Tensor, doublings: int) -> Tensor:
    """Counts over a range doubled that often."""
    import torch

    if doublings == 0:
        return counts
    numbers = torch.arange(counts.numel()) >> min(doublings, 11)
    return torch.zeros_like(counts).index_add_(0, numbers, counts)


OBSERVERS: dict[str, type[Observer]] = {"absmax": AbsMax, "ema": EMA, "histogram": Histogram, "groupwise": Groupwise}
