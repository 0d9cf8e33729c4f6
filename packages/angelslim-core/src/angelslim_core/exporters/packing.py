"""Bit packing of small integers, low bits first: densely into int32 words, as compressed-tensors lays them out, or two a byte.

Shapes: R rows, C columns, W words.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def packed_columns(columns: int, bits: int) -> int:
    """Words that `columns` codes of `bits` bits take."""
    return math.ceil(columns * bits / 32)


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Pack int8 codes in [-2^(bits-1), 2^(bits-1)) into int32 [R, W]; each is stored with 2^(bits-1) added.

    Codes straddle word boundaries where `bits` does not divide 32.
    """
    import torch

    rows, columns = codes_RC.shape
    words = packed_columns(columns, bits)
    padded = math.ceil(columns / 32) * 32
    values = torch.nn.functional.pad(codes_RC.contiguous().view(torch.uint8) + (1 << (bits - 1)), (0, padded - columns))
    if 8 % bits == 0:  # whole codes in each byte
        per_byte = values.view(rows, -1, 8 // bits)
        data = per_byte[..., 0].clone()
        for i in range(1, 8 // bits):
            data |= per_byte[..., i] << (i * bits)
        return data.view(torch.int32)[:, :words].contiguous()
    values = values.view(rows, padded // 32, 32)
    packed = torch.zeros(rows, padded // 32, bits, dtype=torch.int64, device=codes_RC.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = values[..., i].to(torch.int64) << offset
        packed[..., word] |= value & 0xFFFFFFFF
        if offset + bits > 32:
            packed[..., word + 1] |= value >> 32
    return packed.view(rows, -1)[:, :words].to(torch.int32).contiguous()


def unpack(words_RW: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`: int8 codes [R, C]."""
    import torch

    rows, width = words_RW.shape
    half = 1 << (bits - 1)
    if 8 % bits == 0:
        data = words_RW.contiguous().view(torch.uint8)
        parts = [(data >> (i * bits)) & ((1 << bits) - 1) for i in range(8 // bits)]
        return (torch.stack(parts, -1).view(rows, -1)[:, :columns] - half).view(torch.int8).contiguous()
    groups = math.ceil(columns / 32)
    words = torch.nn.functional.pad(words_RW.to(torch.int64) & 0xFFFFFFFF, (0, groups * bits - width)).view(rows, groups, bits)
    codes = torch.empty(rows, groups, 32, dtype=torch.int8, device=words_RW.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = words[..., word] >> offset
        if offset + bits > 32:
            value |= words[..., word + 1] << (32 - offset)
        codes[..., i] = ((value & ((1 << bits) - 1)) - half).to(torch.int8)
    return codes.view(rows, -1)[:, :columns].contiguous()


def pack_nibbles(codes_RC: Tensor) -> Tensor:
    """Two uint8 codes below 16 a byte, the even column in the low half; [R, C / 2]."""
    return codes_RC[:, 0::2] | codes_RC[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`."""
    import torch

    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)
