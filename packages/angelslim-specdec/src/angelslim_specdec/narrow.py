"""Products of a few rows with a weight, on CPUs.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# whole forward passes of 4, 5 and 6 rows were measured to be faster, with MKL; from about 12 rows on single products are not
ROWS = range(2, 9)


class Narrow:
    """Lets a model's plain FP32 linear layers multiply a few rows faster for the time of a call.

    The weight stands on the left. On the right a product of 2 to 8 rows took up to three times that of one, likely for a copy that BLAS makes.

    Args:
        model: layers whose `forward` somebody else replaced are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if type(m) is nn.Linear]

    @contextmanager
    def __call__(self, rows: int) -> Iterator[None]:
        """Inside, layers are as fast as may be for so many rows R."""
        changed = [m for m in self._layers if rows in ROWS and "forward" not in vars(m) and _plain(m.weight)]
        try:
            for layer in changed:
                vars(layer)["forward"] = _product(layer)
            yield
        finally:
            for layer in changed:
                vars(layer).pop("forward", None)


def _plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        """[..., O] of x [..., I]."""
        found = (layer.weight @ x.flatten(0, -2).T).T.contiguous().view(*x.shape[:-1], -1)
        return found if layer.bias is None else found + layer.bias

    return forward
