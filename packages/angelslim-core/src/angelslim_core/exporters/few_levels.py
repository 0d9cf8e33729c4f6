"""Codes of few levels as bytes: digits of a small base, or five bits for every four codes of which just one is zero.

Tables of 256 entries do the work, so that a file is read about as fast as memory.

Shapes: R rows, C columns, Q quads (four columns), B bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from ..errors import ModelError, NumericError

if TYPE_CHECKING:
    from torch import Tensor

# bytes looked up at a time
PIECE = 1 << 20
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

    table = torch.full((256,), 255, dtype=torch.uint8)
    table[torch.tensor(levels) % 256] = torch.arange(len(levels), dtype=torch.uint8)
    index = _looked_up(table[:, None], codes.contiguous().view(torch.uint8))
    if index.numel() and int(index.amax()) == 255:
        raise NumericError(990, "weight", f"has codes other than the levels {tuple(levels)} that its scheme names")
    return index


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


def unpack_digits(packed_RB: Tensor, base: int, per_byte: int, columns: int, levels: Sequence[int] | None = None) -> Tensor:
    """Inverse of `pack_digits`, and with `levels` of `to_index` before it: uint8 digits or int8 codes [R, C].

    Raises:
        ModelError: a byte (hostile input) is no such number, or has a digit that stands for no level.
    """
    import torch

    number = torch.arange(256)[:, None]
    digits = number // base ** torch.arange(per_byte) % base
    good = (number[:, 0] < base**per_byte) & (digits < (base if levels is None else len(levels))).all(-1)
    if not bool(good.all()) and bool((torch.bincount(packed_RB.flatten().int(), minlength=256).cpu()[~good] > 0).any()):
        raise ModelError(
            990, "weight_packed", f"has bytes that are no {per_byte} digits of base {base}" + (f", each one of {len(levels)} levels" if levels else "")
        )
    table = digits.byte() if levels is None else torch.tensor(levels, dtype=torch.int8)[digits.clamp_max(len(levels) - 1)]
    return _looked_up(table, packed_RB)[:, :columns].contiguous()


def pack_quads(codes_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary codes with one zero in every four columns, as slots below 16 and signs [R, Q], both uint8 (see `_quads`).

    Raises:
        NumericError: codes are not of that kind.
    """
    import torch

    table = torch.full((256,), 255, dtype=torch.uint8)
    table[pack_digits(_quads().add(1).byte(), 4, 4)[:, 0].long()] = torch.arange(32, dtype=torch.uint8)
    found = _looked_up(table[:, None], pack_digits(codes_RC.clamp(-1, 2).add(1).byte(), 4, 4))
    if int(codes_RC.amin()) < -1 or int(found.amax()) == 255:
        raise NumericError(991, "weight", "has not just one zero in every four codes, as its scheme says")
    return found & 15, found >> 4


def unpack_quads(slots_RQ: Tensor, signs_RQ: Tensor) -> Tensor:
    """Inverse of `pack_quads`: int8 codes [R, C]. Every slot and sign stands for codes."""
    return _looked_up(_quads(), slots_RQ | signs_RQ << 4)


@cache
def _quads() -> Tensor:
    """The four codes [32, 4] of each slot + 16 * sign.

    slot = place of the zero << 2 | (the third kept has another sign than the first) << 1 | (the second has); sign = the first is -1.
    """
    import torch

    found = []
    for index in range(32):
        sign, place = index >> 4, index >> 2 & 3
        kept = [1 - 2 * (sign ^ other) for other in (0, index & 1, index >> 1 & 1)]
        found.append([*kept[:place], 0, *kept[place:]])
    return torch.tensor(found, dtype=torch.int8)


def _looked_up(table: Tensor, data_RB: Tensor) -> Tensor:
    """Row `data` of a table [N, K] of bytes, one after another: [R, B * K]. Rows of 1, 2, 4 or 8 bytes are fetched as one number."""
    import torch

    rows, width = data_RB.shape
    columns = table.shape[1]
    whole = 1 << (columns - 1).bit_length()
    number = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole]
    entries = torch.nn.functional.pad(table, (0, whole - columns)).contiguous().view(number).flatten().to(data_RB.device)
    found = torch.empty(rows, width * columns, dtype=table.dtype, device=data_RB.device)
    step = max(1, PIECE // max(1, width))
    for start in range(0, rows, step):
        piece = data_RB[start : start + step]
        values = entries.index_select(0, piece.flatten().int()).view(table.dtype).view(len(piece), width, whole)
        found[start : start + step] = values[..., :columns].reshape(len(piece), -1)
    return found
