"""Reading prompts: long ones as they come, short ones as graphs, of which there is one for each of a few padded lengths.

The launches of a pass cost the host more than short prompts cost a GPU: of a model of 135M parameters a prompt of the benchmark's sets took 25 ms on an
H200, and 6 as a graph.

Shapes: G rows that get prompts, P longest prompt, V vocabulary, n tapped layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cache import SlotCache
from .graphs import Runner
from .target import Step, Target

# multiplications and additions of a pass from which on the device is what takes the time (10 ms at 400 TFLOP/s); what a graph works in stays reserved
MOST_WORK = 4e12
# the least padded length; each further one is a third or a half more than the one before
_LEAST = 32


class Prompts:
    """Reads prompts into rows of a cache.

    Args:
        layers: to tap.
        capacity: tokens that a row may have: positions that a prompt may be padded to.
        runner: as for `Engine`; None: nothing is padded.
    """

    def __init__(self, target: Target, cache: SlotCache, layers: Sequence[int], capacity: int, runner: Runner | None) -> None:
        self._target, self._cache, self._layers, self._capacity, self._runner = target, cache, layers, capacity, runner
        self._most_tokens = MOST_WORK / (2 * sum(p.numel() for p in target.model.parameters()))
        self._padded: dict[tuple[int, int], _Padded] = {}

    def __call__(self, prompts: Tensor, lengths: Tensor, rows: Tensor) -> Step:
        """As `Target.prefill`, of prompts [G, P], lengths [G] and rows [G] on the device. What is returned lasts until the next call."""
        batch, longest = prompts.shape
        length = padded_length(longest)
        if self._runner is None or batch * length > self._most_tokens or length > self._capacity:
            return self._read(prompts, lengths, rows)
        if (batch, length) not in self._padded:
            self._padded[batch, length] = _Padded(self._read, batch, length, self._target.device, self._runner)
        step = self._padded[batch, length](prompts, lengths, rows)
        return Step(step.logits, None if step.aux is None else step.aux[:, :longest], step.final[:, :longest])

    def _read(self, prompts: Tensor, lengths: Tensor, rows: Tensor) -> Step:
        return self._target.prefill(prompts, lengths, self._cache, self._layers, rows)


class _Padded:
    """Prompts of one padded length, in tensors that stay where they are."""

    def __init__(self, read: Callable[[Tensor, Tensor, Tensor], Step], batch: int, length: int, device: torch.device, runner: Runner) -> None:
        self._ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self._lengths, self._rows = (torch.ones(batch, dtype=torch.int64, device=device) for _ in range(2))
        self._step: Step | None = None

        def run() -> None:
            self._step = read(self._ids, self._lengths, self._rows)

        self._run = runner(run)

    def __call__(self, prompts: Tensor, lengths: Tensor, rows: Tensor) -> Step:
        self._ids[:, : prompts.shape[1]] = prompts
        self._lengths.copy_(lengths)
        self._rows.copy_(rows)
        self._run()
        assert self._step is not None
        return self._step


def padded_length(tokens: int) -> int:
    """32, 48, 64, 96, 128, 192...: the first that is not below."""
    whole = _LEAST
    while whole < tokens:
        whole *= 2
    part = whole * 3 // 4
    return part if part >= max(tokens, _LEAST) else whole
