"""How well quantized tiles keep what training added to them, for several scales at once (DAQ, 2603.22324, section 3).

A tile is whatever shares a scale: N weights w, of which the base model had b; d = w - b was learned. Under a scale s the
tile is stored as q, and keeps d' = q - b. T tiles, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.rounding import cast_e4m3, e2m1_codes, round_e2m1, round_e4m3
from angelslim_core.schemes import Grid

Elements = Literal["e4m3", "e2m1", "int"]
# values of a tile's chunk that are worked on at once: a few fp32 copies stay in the processor's cache
_CHUNK = 1 << 16


class Scales(NamedTuple):
    """Scales of tiles as they are stored.

    Args:
        scale_CT: dtype of the grid's scales.
        zero_CT: zero points, int8, or None.
        grid: FP8, integers or NVFP4.
        global_scale: [1], of NVFP4.
    """

    scale_CT: Tensor
    zero_CT: Tensor | None
    grid: Grid
    global_scale: Tensor | None = None

    @property
    def elements(self) -> Elements:
        """What values are rounded to."""
        return "int" if self.grid.type == "int" else "e4m3" if self.grid.bits == 8 else "e2m1"

    @property
    def half(self) -> int:
        """Integers are in [-half, half - 1]."""
        return 1 << (self.grid.bits - 1)

    def steps(self) -> tuple[Tensor, Tensor | None]:
        """What element values are multiplied by, and zero points, fp32 [C, T]."""
        step = self.scale_CT.float() if self.global_scale is None else self.scale_CT.float() * self.global_scale
        return step, None if self.zero_CT is None else self.zero_CT.float()


class Sums(NamedTuple):
    """Sums over each tile, fp32.

    Args:
        tried_C4T: of each candidate `kept_CT`, `dot_CT`, `found_CT`, `error_CT`.
        own_2T: `changed_T`, `learned_T`.
    """

    tried_C4T: Tensor
    own_2T: Tensor

    @property
    def kept_CT(self) -> Tensor:
        """Weights with |d| > threshold of which d' has the sign of d."""
        return self.tried_C4T[:, 0]

    @property
    def dot_CT(self) -> Tensor:
        """Of d d'."""
        return self.tried_C4T[:, 1]

    @property
    def found_CT(self) -> Tensor:
        """Of d'^2."""
        return self.tried_C4T[:, 2]

    @property
    def error_CT(self) -> Tensor:
        """Of (q - w)^2."""
        return self.tried_C4T[:, 3]

    @property
    def changed_T(self) -> Tensor:
        """Weights with |d| > threshold."""
        return self.own_2T[0]

    @property
    def learned_T(self) -> Tensor:
        """Of d^2."""
        return self.own_2T[1]

    def joined(self, other: Sums) -> Sums:
        """With other candidates of the same tiles."""
        return Sums(torch.cat([self.tried_C4T, other.tried_C4T]), self.own_2T)

    def only(self, candidate: int) -> Sums:
        """One candidate's."""
        return Sums(self.tried_C4T[candidate : candidate + 1], self.own_2T)


def round_pulled(
    weight_TN: Tensor, base_TN: Tensor | None, step_T: Tensor, zero_T: Tensor | None, pull_T: Tensor | None, elements: Elements, half: int
) -> Tensor:  # fmt: skip
    """Element values [T, N] (of integers: codes) that tiles are stored as.

    Args:
        weight_TN, base_TN: any float dtype; the base is not needed where nothing is pulled.
        pull_T: the weight is rounded as if it lay that many times d further, by less than half a step; or None.
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


def reference(weight_TN: Tensor, base_TN: Tensor, scales: Scales, pulls: Sequence[float], threshold: float) -> Sums:
    """The sums, a candidate at a time.

    Args:
        weight_TN, base_TN: any float dtype; padding of both by 0 adds nothing.
        pulls: C numbers, see `round_pulled`; or none.
        threshold: |d| up to this counts as unchanged.
    """
    weight, base = weight_TN.float(), base_TN.float()
    delta = weight - base
    moved = delta.abs() > threshold
    sign = delta.sign()
    step_CT, zero_CT = scales.steps()
    rows = []
    for c, step in enumerate(step_CT):
        zero = None if zero_CT is None else zero_CT[c]
        pull = step.new_full((len(weight),), pulls[c]) if pulls and pulls[c] else None
        value = round_pulled(weight, base, step, zero, pull, scales.elements, scales.half)
        if zero is not None:
            value = value - zero[:, None]
        value = value * step[:, None]
        found = value - base
        kept = ((found.sign() == sign) & moved).sum(1).float()
        rows.append(torch.stack([kept, (delta * found).sum(1), found.square().sum(1), (value - weight).square().sum(1)]))
    return Sums(torch.stack(rows), torch.stack([moved.sum(1).float(), delta.square().sum(1)]))


def _chunked(weight_TN: Tensor, base_TN: Tensor, scales: Scales, pulls: Sequence[float], threshold: float) -> Sums:
    """The reference on a few tiles at a time, so that what it makes stays in the processor's cache."""
    tiles = max(1, _CHUNK // weight_TN.shape[1])
    parts = []
    for start in range(0, len(weight_TN), tiles):
        piece = slice(start, start + tiles)
        zero = None if scales.zero_CT is None else scales.zero_CT[:, piece]
        parts.append(reference(weight_TN[piece], base_TN[piece], scales._replace(scale_CT=scales.scale_CT[:, piece], zero_CT=zero), pulls, threshold))
    return Sums(*(torch.cat(found, -1) for found in zip(*parts, strict=True)))


def codes(weight_TN: Tensor, base_TN: Tensor | None, scales: Scales, pull_T: Tensor | None) -> Tensor:
    """Codes [T, N] as they are stored, under scales of one candidate; others as of `round_pulled`."""
    step_CT, zero_CT = scales.steps()
    levels = round_pulled(weight_TN, base_TN, step_CT[0], None if zero_CT is None else zero_CT[0], pull_T, scales.elements, scales.half)
    if scales.elements == "int":
        return levels.to(torch.int8)
    return cast_e4m3(levels) if scales.elements == "e4m3" else e2m1_codes(levels)


def _triton(weight_TN: Tensor, base_TN: Tensor, scales: Scales, pulls: Sequence[float], threshold: float) -> Sums:
    from .triton.delta_sums import delta_sums

    return delta_sums(weight_TN, base_TN, scales, pulls, threshold)


def _triton_codes(weight_TN: Tensor, base_TN: Tensor | None, scales: Scales, pull_T: Tensor | None) -> Tensor:
    from .triton.delta_sums import codes

    return codes(weight_TN, base_TN, scales, pull_T)


def _on_gpu(weight_TN: Tensor, *_: object) -> tuple[bool, str]:
    return weight_TN.is_cuda, "tensors on a GPU"


DELTA_SUMS = Kernel("quant.delta_sums", reference, (Implementation("triton", _triton, _on_gpu, triton_runs), Implementation("torch", _chunked)))
DELTA_CODES = Kernel("quant.delta_codes", codes, (Implementation("triton", _triton_codes, _on_gpu, triton_runs), Implementation("torch", codes)))
