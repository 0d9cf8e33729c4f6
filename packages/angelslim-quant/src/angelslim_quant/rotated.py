"""A model's tensors in a rotated basis, computed one at a time as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from angelslim_core.adapters.base import Part
from angelslim_core.source import RewrittenSource, Source

if TYPE_CHECKING:
    from torch import Tensor

    from angelslim_core.transforms import Transform

    from .numerics.hadamard import Rotation

# numbers of a large tensor that are computed at a time
CHUNK = 1 << 24


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor.

    Args:
        fold: norm whose weight its inputs are multiplied by.
        inputs: its inputs (last axis) are rotated: W Q.
        outputs: its outputs (the axis before, or a bias) are rotated: Q^T W.
        fill: it is a folded norm, whose weight becomes this.
        order: the `down` weight by whose columns the channels between it and what feeds it are put in another order;
            its own inputs if it is that weight, the outputs of one that feeds it otherwise.
        block: in that order, each block of so many channels has a fair share of the large ones.
    """

    fold: str | None = None
    inputs: Rotation | None = None
    outputs: Rotation | None = None
    fill: float | None = None
    order: str | None = None
    block: int = 1


class RotatedSource(RewrittenSource):
    """A source with the changes of `quant.rotate`.

    Args:
        changes: tensor -> what becomes of it.
        norm_offset: a norm multiplies by its weight plus this.
        transposed: stacked tensors are [experts, in, out].
        device: where to compute.
    """

    def __init__(
        self, inner: Source, pass_id: str, changes: Mapping[str, Change], *, norm_offset: float, transposed: bool, device: str,
        added: Mapping[str, str], dropped: Mapping[str, str], config: dict[str, Any], report: Mapping[str, Any], warnings: Iterable[str],
        transforms: tuple[Transform, ...],
    ) -> None:  # fmt: skip
        super().__init__(
            inner, pass_id, frozenset(changes), added=added, dropped=dropped, config=config, report=report, warnings=warnings, transforms=transforms
        )
        self.changes, self.norm_offset, self.transposed, self.device = changes, norm_offset, transposed, device
        self._orders: dict[tuple[str, int | None], Tensor] = {}

    def scratch(self, name: str) -> int:
        if name in self._matrices:
            return 12 * self.shapes[name][0] ** 2
        inner = self.inner.scratch(self._names[name])
        if name not in self.changes:
            return inner
        shape = self.shapes[name]
        numbers = shape[-1] * (shape[-2] if len(shape) > 1 else 1)
        change = self.changes[name]
        return inner + 12 * (numbers if change.outputs and change.inputs else min(numbers, CHUNK))

    def read(self, name: str, part: Part | None = None) -> Tensor:
        change = self.changes.get(name)
        if change is None or change.order is None:
            return super().read(name, part)
        tensor = self.inner.read(self._names[name], part)
        if tensor.dim() == 3:
            for expert, matrix in enumerate(tensor):
                self._reorder(matrix.T if self.transposed else matrix, change, name, expert)
        else:
            self._reorder(tensor, change, name, part.expert if part else None)
        return self.rewrite(name, tensor)

    def _reorder(self, weight: Tensor, change: Change, name: str, expert: int | None) -> None:
        """Put the inputs of `down`, or the outputs of what feeds it (gate and up in one tensor too), in their order, in place."""
        order_I = self._order(change, expert)
        if name == change.order:
            weight.copy_(weight[:, order_I])
        else:
            parts = weight.unflatten(0, (-1, order_I.numel()))
            parts.copy_(parts[:, order_I])

    def _order(self, change: Change, expert: int | None) -> Tensor:
        """[I]: which channel comes first, second, ...: by L1 norm of the columns of `down`, dealt to the blocks to and fro."""
        import torch

        assert change.order
        if (change.order, expert) not in self._orders:
            rows = self.shapes[change.order][-1 if self.transposed else -2]
            down = self.inner.read(self._names[change.order], None if expert is None else Part(expert, 0, rows, self.transposed))
            dealt_BN = down.float().abs().sum(0).argsort(descending=True, stable=True).view(change.block, -1).clone()
            dealt_BN[1::2] = dealt_BN[1::2].flip(1)
            self._orders[change.order, expert] = dealt_BN.T.reshape(-1)
            assert torch.equal(self._orders[change.order, expert].sort().values, torch.arange(down.shape[1]))
        return self._orders[change.order, expert]

    def rewrite(self, name: str, tensor: Tensor) -> Tensor:
        import torch

        change = self.changes[name]
        if change.fill is not None:
            return torch.full_like(tensor, change.fill)
        scale = self.inner.read(change.fold).double() + self.norm_offset if change.fold else None
        for matrix in tensor if tensor.dim() == 3 else [tensor]:
            rotate(matrix.T if self.transposed and tensor.dim() == 3 else matrix, change, scale, self.device)
        return tensor


def rotate(weight: Tensor, change: Change, scale_I: Tensor | None, device: str) -> None:
    """Change a weight [out, in], or a bias [out], in place, with one rounding to its dtype.

    Args:
        scale_I: factors of the inputs.
    """
    if weight.dim() == 1:
        pieces: Iterable[Tensor] = [weight]
    elif change.outputs is None:
        pieces = weight.split(max(1, CHUNK // weight.shape[1]))
    elif change.inputs is None and scale_I is None:
        pieces = weight.split(max(1, CHUNK // weight.shape[0]), 1)
    else:
        pieces = [weight]
    for piece in pieces:
        x = piece.to(device).double() if piece.element_size() == 8 else piece.to(device).float()
        if scale_I is not None:
            x = x * scale_I.to(x)
        if change.inputs is not None:
            x = change.inputs(x)
        if change.outputs is not None:
            x = change.outputs(x.T).T if x.dim() == 2 else change.outputs(x)
        piece.copy_(x)
