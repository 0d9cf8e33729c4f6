"""Streaming statistics over the rows of activations x [N, I]; padding never reaches them. All accumulate in fp32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

from ..errors import NumericError

if TYPE_CHECKING:
    from torch import Tensor


class Observer(ABC):
    """Sees rows, answers with a range."""

    def __init__(self) -> None:
        self.rows = 0

    def observe(self, x_NI: Tensor) -> None:
        """Take rows into account.

        Raises:
            NumericError: a value is not finite.
        """
        import torch

        if x_NI.numel() == 0:
            return
        magnitude = x_NI.detach().float().abs()
        if not bool(torch.isfinite(magnitude).all()):
            raise NumericError(60, type(self).__name__, "calibration met an activation that is not finite")
        self.rows += x_NI.shape[0]
        self._update(magnitude)

    def result(self) -> Tensor:
        """The range as fp32 absolute maxima.

        Raises:
            NumericError: no row was seen.
        """
        if not self.rows:
            raise NumericError(61, type(self).__name__, "calibration showed it no token")
        return self._result()

    @abstractmethod
    def _update(self, magnitude: Tensor) -> None: ...

    @abstractmethod
    def _result(self) -> Tensor: ...


class AbsMax(Observer):
    """Largest magnitude, per tensor [1], per column [I], or per group of columns [I / g]; order does not matter."""

    def __init__(self, strategy: Literal["tensor", "channel", "group"] = "tensor", group_size: int | None = None) -> None:
        super().__init__()
        self.strategy, self.group_size = strategy, group_size
        self._amax: Tensor | None = None

    def _update(self, magnitude: Tensor) -> None:
        import torch

        columns = magnitude.amax(0)
        if self.strategy == "tensor":
            columns = columns.amax().reshape(1)
        elif self.strategy == "group":
            columns = columns.unflatten(0, (-1, self.group_size or columns.numel())).amax(-1)
        self._amax = columns if self._amax is None else torch.maximum(self._amax, columns)

    def _result(self) -> Tensor:
        assert self._amax is not None
        return self._amax

    def merge(self, other: AbsMax) -> None:
        """Add what another observer of the same kind saw."""
        import torch

        if other._amax is not None:
            self._amax = other._amax.clone() if self._amax is None else torch.maximum(self._amax, other._amax)
            self.rows += other.rows


class EMA(Observer):
    """Per-tensor absmax of each call, smoothed: m = b m + (1 - b) amax, divided by 1 - b^n. Depends on the order."""

    def __init__(self, momentum: float = 0.98) -> None:
        super().__init__()
        self.momentum = momentum
        self._mean, self._calls = 0.0, 0

    def _update(self, magnitude: Tensor) -> None:
        self._mean = self.momentum * self._mean + (1 - self.momentum) * float(magnitude.amax())
        self._calls += 1

    def _result(self) -> Tensor:
        import torch

        return torch.tensor([self._mean / (1 - self.momentum**self._calls)])


class Histogram(Observer):
    """Quantile of magnitudes from 2048 bins over [0, 2^k]; doubling the range merges bins exactly, so order is moot."""

    BINS = 2048

    def __init__(self, quantile: float = 0.9999) -> None:
        super().__init__()
        self.quantile_ = quantile
        self._top = 0.0
        self._counts: Tensor | None = None

    def _update(self, magnitude: Tensor) -> None:
        import math

        import torch

        if self._counts is None:
            self._counts = torch.zeros(self.BINS, dtype=torch.int64)
            self._top = 2.0**-40
        peak = float(magnitude.max())
        self._grow(2.0 ** math.ceil(math.log2(peak)) if peak > 0 else self._top)
        # the upper edge belongs to its bin: a power of two must not count as the next range
        index = (magnitude.flatten() * (self.BINS / self._top)).ceil_().sub_(1).clamp_(0, self.BINS - 1).long()
        self._counts += torch.bincount(index, minlength=self.BINS).cpu()

    def _grow(self, top: float) -> None:
        assert self._counts is not None
        while self._top < top:
            merged = self._counts.view(-1, 2).sum(1)
            self._counts = merged.new_zeros(self.BINS)
            self._counts[: self.BINS // 2] = merged
            self._top *= 2

    def quantile(self, p: float) -> Tensor:
        """Upper edge of the bin that holds the p-quantile, [1]."""
        import torch

        assert self._counts is not None
        cumulative = self._counts.cumsum(0)
        index = int(torch.searchsorted(cumulative, torch.tensor(p * int(cumulative[-1])).ceil().long().clamp(min=1)))
        return torch.tensor([(index + 1) * self._top / self.BINS])

    def _result(self) -> Tensor:
        return self.quantile(self.quantile_)

    def merge(self, other: Histogram) -> None:
        """Add what another histogram saw."""
        if other._counts is None:
            return
        if self._counts is None:
            self._counts, self._top = other._counts.clone(), other._top
        else:
            self._grow(other._top)
            copy = Histogram()
            copy._counts, copy._top = other._counts.clone(), other._top
            copy._grow(self._top)
            self._counts += copy._counts
        self.rows += other.rows


OBSERVERS: dict[str, type[Observer]] = {"absmax": AbsMax, "ema": EMA, "histogram": Histogram}
