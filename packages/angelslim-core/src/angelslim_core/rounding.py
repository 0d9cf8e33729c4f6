"""Rounding to formats narrower than 16 bits: to nearest, ties to even, saturating at the largest value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from .schemes import E2M1

if TYPE_CHECKING:
    from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = E2M1[-1]


def cast_e4m3(x: Tensor) -> Tensor:
    """FP8 E4M3FN, which has no infinity: an unclamped cast would overflow to NaN."""
    import torch

    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e4m3(x: Tensor) -> Tensor:
    """The FP8 E4M3 value nearest to each, fp32: `cast_e4m3` in less than half the time."""
    return _round_float(x, least=2.0**-6, most=256.0, part=0.125, largest=E4M3_MAX)


def round_e2m1(x: Tensor) -> Tensor:
    """The FP4 E2M1 value nearest to each, fp32."""
    return _round_float(x, least=1.0, most=4.0, part=0.5, largest=E2M1_MAX)


def _round_float(x: Tensor, least: float, most: float, part: float, largest: float) -> Tensor:
    """Steps are `part` of the power of two below, which lies between `least` and `most`."""
    import torch

    x = x.float()
    magnitude = x.abs().clamp_max_(largest)
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)
    # what is added to 1.5 * 2^23 steps is rounded to whole ones, ties to even
    whole = power.clamp_(least, most).mul_(part * 1.5 * 2**23)
    return magnitude.add_(whole).sub_(whole).copysign_(x)


def e2m1_codes(values: Tensor) -> Tensor:
    """uint8 codes (sign << 3 | index) of E2M1 values; zero has no sign."""
    import torch

    doubled = (values * 2).to(torch.int8)
    # 0, 1, 2, 3, 4, 6, 8, 12: every step above 2 is twice, above 4 four times as wide
    index = doubled.abs()
    index = torch.minimum(torch.minimum(index, (index >> 1) + 2), (index >> 2) + 4)
    return index.bitwise_or_((doubled >> 4) & 8).view(torch.uint8)


def e8m0_codes(amax: Tensor, largest: float, rounding: Literal["up", "down", "even"]) -> Tensor:
    """uint8 codes of the power of two 2^(code - 127) by which blocks of values are divided; 127 where amax is 0.

    Args:
        amax: largest magnitudes.
        largest: the element format's largest value.
        rounding: "up": the least power for which nothing saturates; "down": floor(log2 amax) - floor(log2 largest);
            "even": as "down", with amax of 1.75 or more times a power of two taken as the next one.
    """
    import torch

    mantissa, exponent = torch.frexp(amax.float())
    limit, offset = math.frexp(largest)
    exponent = exponent - offset
    if rounding != "down":
        exponent += mantissa > limit if rounding == "up" else mantissa >= 0.875
    # 2^-127 is no normal fp32 number
    return torch.where(amax > 0, exponent.clamp(-126, 127) + 127, 127).to(torch.uint8)
