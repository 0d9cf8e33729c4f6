"""Codes of few levels as bytes: digits of a small base, or five bits for every four codes of which just one is zero.

Shapes: R rows, C columns, Q quads (four columns), B bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ModelError, NumericError

if TYPE_CHECKING:
    from torch import Tensor

TERNARY = (-1, 0, 1)
MOST = 4


def occurring(codes: Tensor, most: int = MOST) -> tuple[int, ...] | None:
    """The values that integer codes have, ascending; None where there are more than `most`."""
    found: list[int] = []
    for value in range(int(codes.amin()), int(codes.amax()) + 1) if codes.numel() else ():
        if bool((codes == value).any()):
            found.append(value)
            if len(found) > most:
                return None
    return tuple(found)


def in_quads(codes_RC: Tensor) -> bool:
    """Whether just one code in every four neighbours of a row is zero."""
    return codes_RC.shape[1] % 4 == 0 and bool(((codes_RC.unflatten(1, (-1, 4)) == 0).sum(-1) == 1).all())


def to_index(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """uint8 place of each int8 code among ascending levels.

    Raises:
        NumericError: a code is none of them.
    """
    import torch

    index = torch.zeros_like(codes, dtype=torch.uint8)
    for level in levels[1:]:
        index += codes >= level
    if not from_index(index, levels).equal(codes):
        raise NumericError(990, "weight", f"has codes other than the levels {tuple(levels)} that its scheme names")
    return index


def from_index(index: Tensor, levels: Sequence[int]) -> Tensor:
    """Inverse of `to_index`.

    Raises:
        ModelError: an index (hostile input) stands for no level.
    """
    import torch

    if index.numel() and int(index.amax()) >= len(levels):
        raise ModelError(990, "weight_packed", f"has a code that stands for none of its {len(levels)} levels")
    codes = torch.full_like(index, levels[0], dtype=torch.int8)
    for place, level in enumerate(levels[1:], 1):
        codes.masked_fill_(index == place, level)
    return codes


def byte_columns(columns: int, per_byte: int) -> int:
    """Bytes that a row of digits takes."""
    return math.ceil(columns / per_byte)


def pack_digits(digits_RC: Tensor, base: int, per_byte: int) -> Tensor:
    """uint8 digits below `base` as [R, B], the first of each `per_byte` columns counting least; rows are filled up with zeros."""
    import torch

    rows, columns = digits_RC.shape
    wide = torch.nn.functional.pad(digits_RC, (0, -columns % per_byte)).view(rows, -1, per_byte)
    packed = wide[..., 0].clone()
    for place in range(1, per_byte):
        packed += wide[..., place] * base**place
    return packed


def unpack_digits(packed_RB: Tensor, base: int, per_byte: int, columns: int) -> Tensor:
    """Inverse of `pack_digits`: uint8 [R, C].

    Raises:
        ModelError: a byte (hostile input) is no such number.
    """
    import torch

    if base**per_byte < 256 and packed_RB.numel() and int(packed_RB.amax()) >= base**per_byte:
        raise ModelError(991, "weight_packed", f"has a byte above {base**per_byte - 1}, which is no number of {per_byte} digits of base {base}")
    digits = torch.stack([packed_RB // base**place % base for place in range(per_byte)], -1)
    return digits.flatten(1)[:, :columns].contiguous()


def pack_quads(codes_Q4: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary codes [..., 4] with one zero in every four, as slots [...] below 16 and signs [...], both uint8.

    slot = zero's place << 2 | (third kept sign differs from the first) << 1 | (second differs); sign = the first kept is -1.

    Raises:
        NumericError: four codes are not of that kind.
    """
    import torch

    zero = codes_Q4 == 0
    if not bool((zero.sum(-1) == 1).all()) or int(codes_Q4.abs().amax()) > 1:
        raise NumericError(991, "weight", "has not just one zero in every four codes, as its scheme says")
    place = zero.to(torch.uint8).argmax(-1).to(torch.uint8)
    minus = codes_Q4 < 0
    first = torch.where(place == 0, minus[..., 1], minus[..., 0])
    second = torch.where(place <= 1, minus[..., 2], minus[..., 1]) ^ first
    third = torch.where(place <= 2, minus[..., 3], minus[..., 2]) ^ first
    return place << 2 | third.to(torch.uint8) << 1 | second, first.to(torch.uint8)


def unpack_quads(slots: Tensor, signs: Tensor) -> Tensor:
    """Inverse of `pack_quads`: int8 codes [..., 4]. Every slot and sign stands for codes."""
    import torch

    place = slots >> 2
    codes = []
    for lane in range(4):
        kept = lane - (place < lane).to(torch.uint8)  # among the three that are not zero
        other = torch.where(kept == 1, slots & 1, torch.where(kept == 2, slots >> 1 & 1, 0))
        codes.append(torch.where(place == lane, 0, 1 - 2 * (other ^ signs).to(torch.int8)))
    return torch.stack(codes, -1).to(torch.int8)
