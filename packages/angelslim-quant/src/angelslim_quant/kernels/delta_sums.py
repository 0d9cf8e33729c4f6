"""How well quantized tiles keep what training added to them, for several scales at once (DAQ, 2603.22324, section 3).

A tile is whatever shares a scale: N weights w, of which the base model had b; d = w - b was learned. Under a scale s the
tile is stored as q, and keeps d' = q - b. T tiles, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel
from angelslim_core.rounding import round_e2m1, round_e4m3

from .available import triton_runs

Elements = Literal["e4m3", "e2m1", "int"]
# values of a tile's chunk that are worked on at once: a few fp32 copies stay in the processor's cache
_CHUNK = 1 << 16


class Candidates(NamedTuple):
    """How tiles might be stored.

    Args:
        elements: "e4m3", "e2m1", or "int": whole numbers in [-half, half - 1].
        step_CT: what element values are multiplied by, fp32.
        zero_CT: zero points of integers, fp32, or None.
        pulls: C numbers; the weight is rounded as if it lay that many times d further, by less than half a step.
        half: of integers.
    """

    elements: Elements
    step_CT: Tensor
    zero_CT: Tensor | None
    pulls: Sequence[float]
    half: int = 0


class Sums(NamedTuple):
    """Sums over each tile, fp32.

    Args:
        kept_CT: weights with |d| > threshold of which d' has the sign of d.
        dot_CT: of d d'.
        found_CT: of d'^2.
        error_CT: of (q - w)^2.
        changed_T: weights with |d| > threshold.
        learned_T: of d^2.
    """

    kept_CT: Tensor
    dot_CT: Tensor
    found_CT: Tensor
    error_CT: Tensor
    changed_T: Tensor
    learned_T: Tensor

    def joined(self, other: Sums) -> Sums:
        """With the candidates of another search of the same tiles."""
        kept, dot, found, error = (torch.cat(pair) for pair in zip(self[:4], other[:4], strict=True))
        return Sums(kept, dot, found, error, self.changed_T, self.learned_T)


def round_pulled(
    weight_TN: Tensor, base_TN: Tensor | None, step_T: Tensor, zero_T: Tensor | None, pull_T: Tensor | None, elements: Elements, half: int
) -> Tensor:  # fmt: skip
    """Element values [T, N] (of integers: codes) that tiles are stored as.

    Args:
        weight_TN, base_TN: any float dtype; the base is not needed where nothing is pulled.
        pull_T: see `Candidates`, or None.
    """
    weight = weight_TN.float()
    x = weight / step_T[:, None]
    if base_TN is not None and pull_T is not None:
        x = _pulled(x, (weight - base_TN.float()) * pull_T[:, None] / step_T[:, None], elements)
    if elements != "int":
        return round_e4m3(x) if elements == "e4m3" else round_e2m1(x)
    x = x.round_()
    if zero_T is not None:
        x += zero_T[:, None]
    return x.clamp_(-half, half - 1)


def _pulled(x: Tensor, shift: Tensor, elements: Elements) -> Tensor:
    """x + shift, held back so that it is rounded to one of the two values around x: a little less than half a step, or a quarter
    where steps below are half as wide."""
    if elements == "int":
        return x + shift.clamp(-0.4999, 0.4999)
    least, most, part = (2.0**-6, 256.0, 0.125) if elements == "e4m3" else (1.0, 4.0, 0.5)
    power = (x.abs().view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(least, most)
    near = power * (part * 0.4999)
    found = x + torch.maximum(torch.minimum(shift, near), -near)
    inner = power * (1 - part * 0.2499)
    return torch.where((x.abs() >= power) & (found.abs() < inner), inner.copysign(x), found)


def reference(weight_TN: Tensor, base_TN: Tensor, candidates: Candidates, threshold: float) -> Sums:
    """The sums, a candidate at a time.

    Args:
        weight_TN, base_TN: any float dtype; padding of both by 0 adds nothing.
        threshold: |d| up to this counts as unchanged.
    """
    weight, base = weight_TN.float(), base_TN.float()
    delta = weight - base
    moved = delta.abs() > threshold
    sign = delta.sign()
    rows = []
    for c, step in enumerate(candidates.step_CT):
        zero = None if candidates.zero_CT is None else candidates.zero_CT[c]
        pull = step.new_full((len(weight),), candidates.pulls[c]) if candidates.pulls[c] else None
        value = round_pulled(weight, base, step, zero, pull, candidates.elements, candidates.half)
        if zero is not None:
            value = value - zero[:, None]
        value = value * step[:, None]
        found = value - base
        rows.append((((found.sign() == sign) & moved).sum(1).float(), (delta * found).sum(1), found.square().sum(1), (value - weight).square().sum(1)))
    kept, dot, squares, error = (torch.stack(r) for r in zip(*rows, strict=True))
    return Sums(kept, dot, squares, error, moved.sum(1).float(), delta.square().sum(1))


def _chunked(weight_TN: Tensor, base_TN: Tensor, candidates: Candidates, threshold: float) -> Sums:
    """The reference on a few tiles at a time, so that what it makes stays in the processor's cache."""
    tiles = max(1, _CHUNK // weight_TN.shape[1])
    parts = []
    for start in range(0, len(weight_TN), tiles):
        piece = slice(start, start + tiles)
        zero = None if candidates.zero_CT is None else candidates.zero_CT[:, piece]
        parts.append(reference(weight_TN[piece], base_TN[piece], candidates._replace(step_CT=candidates.step_CT[:, piece], zero_CT=zero), threshold))
    return Sums(*(torch.cat(found, -1) for found in zip(*parts, strict=True)))


def _triton(weight_TN: Tensor, base_TN: Tensor, candidates: Candidates, threshold: float) -> Sums:
    from .triton.delta_sums import delta_sums

    return delta_sums(weight_TN, base_TN, candidates, threshold)


def _triton_round(weight_TN: Tensor, *others: Any) -> Tensor:
    from .triton.delta_sums import round_pulled

    return round_pulled(weight_TN, *others)


def _on_gpu(weight_TN: Tensor, *_: object) -> tuple[bool, str]:
    return weight_TN.is_cuda, "tensors on a GPU"


DELTA_SUMS = Kernel("quant.delta_sums", reference, (Implementation("triton", _triton, _on_gpu, triton_runs), Implementation("torch", _chunked)))
ROUND_PULLED = Kernel(
    "quant.round_pulled", round_pulled, (Implementation("triton", _triton_round, _on_gpu, triton_runs), Implementation("torch", round_pulled))
)
