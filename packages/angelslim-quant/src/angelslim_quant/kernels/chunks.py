"""Rows of a weight that are worked on at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# values: fp32 copies of these stay in a core's cache; on a GPU, scratch is bounded
CPU, GPU = 1 << 18, 1 << 25


def row_chunks(weight_OI: Tensor, multiple: int = 1) -> Iterator[slice]:
    """All rows in order, some at a time; each chunk but the last has a number of them that `multiple` divides."""
    import torch

    size = CPU * torch.get_num_threads() if weight_OI.device.type == "cpu" else GPU
    rows = max(1, size // max(1, weight_OI.shape[1] * multiple)) * multiple
    return (slice(start, min(start + rows, weight_OI.shape[0])) for start in range(0, weight_OI.shape[0], rows))
