"""Quantizers and data that are small enough to train with in tests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..fake_quant import FakeQuantizer, place
from ..schemes import Grid, Quantized, Scheme

INT3 = Scheme("int3 channel", Grid(4, "int", "channel", levels=(-3, -2, -1, 0, 1, 2, 3)))


class _Straight(torch.autograd.Function):
    """Rounds; the gradient goes on as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


class Int3(FakeQuantizer):
    """Whole numbers from -3 to 3 with a scale for each row, which is learnt; weights are frozen."""

    trains_weight: ClassVar[bool] = False

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__(INT3)
        self.scale = nn.Parameter(weight_OI.detach().float().abs().amax(1, keepdim=True) / 3)

    def _codes(self, weight_OI: Tensor) -> Tensor:
        return _Straight.apply((weight_OI.float() / self.scale).clamp(-3, 3))  # type: ignore[no-any-return]

    def weight(self, weight_OI: Tensor) -> Tensor:
        return (self._codes(weight_OI) * self.scale).to(weight_OI.dtype)

    def quantized(self, weight_OI: Tensor) -> Quantized:
        return Quantized(INT3, self._codes(weight_OI).to(torch.int8), self.scale.detach())


class Int3Along(Int3):
    """The same, and weights are trained along."""

    trains_weight: ClassVar[bool] = True


def rounded(model: nn.Module, quantizer: type[Int3] = Int3) -> None:
    """Let all linears of the layers round."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            place(module, quantizer(module.weight))


def chats(path: Path, rows: int = 40, seed: int = 0, words: Sequence[str] = ("ab", "cd", "efg", "h")) -> Path:
    """Write a JSONL file of conversations of unequal lengths."""
    draw = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(2, most)))

    found = [{"messages": [{"role": "user", "content": text(5)}, {"role": "assistant", "content": text(14)}]} for _ in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path
