"""How often each magnitude occurs, to the 8 significant bits of BF16: exact where activations are BF16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from angelslim_core.stream import check_finite


class Magnitudes:
    """Counts of |x| over all rows seen; the same however the rows are ordered and cut into calls.

    Attributes:
        counts: int64 [32768], by the bits of a BF16 number without its sign.
        peak: fp64 [1], the largest |x|, exact.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(1 << 15, dtype=torch.int64)
        self.peak = torch.zeros(1, dtype=torch.float64)

    def add(self, where: str, x: Tensor) -> None:
        """Count values of any float dtype.

        Raises:
            NumericError: one is not finite; `where` says of what.
        """
        if x.numel() == 0:
            return
        check_finite(where, x)
        magnitude = x.detach().abs()
        self.peak = self.peak.maximum(magnitude.max().cpu().double())
        bits = magnitude.to(torch.bfloat16).view(torch.int16).flatten()
        self.counts += torch.bincount(bits.int(), minlength=1 << 15).cpu()

    def reduced(self, reduce: Callable[..., Tensor]) -> Magnitudes:
        """With what other processes saw; see `parallel.Group.reduce`."""
        self.counts, self.peak = reduce(self.counts), reduce(self.peak, "max")
        return self

    def quantile(self, p: float) -> float:
        """|x| in ascending order at place round(n p), the last at most; 0 if nothing was seen."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        rank = min(round(total * p), total - 1)
        bits = torch.searchsorted(self.counts.cumsum(0), rank, right=True)
        return float(bits.to(torch.int16).view(torch.bfloat16))
