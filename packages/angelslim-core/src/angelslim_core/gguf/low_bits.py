"""Bytes of the block types for few levels, from codes and back. Q2_0 and STQ1_0 are laid out here both ways, as the gguf library knows neither.

Of a block of n weights each function takes codes [..., n] and a scale d, F16.

Sources: ggml-common.h and ggml-quants.c of llama.cpp; for STQ1_0 its pull request 22836, which no release contains.
Shapes: N blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..exporters.few_levels import pack_digits, pack_quads, unpack_digits, unpack_quads

if TYPE_CHECKING:
    from torch import Tensor


def q2_0(codes_N64: Tensor, scale_N: Tensor) -> Tensor:
    """[N, 18]: d, then four codes a byte, the first lowest; codes -1 to 2 are stored as 0 to 3."""
    return _joined(scale_N, pack_digits(codes_N64.add(1).byte(), 4, 4))


def from_q2_0(blocks: Tensor) -> Tensor:
    """fp32 weights [N, 64] of blocks [N, 18]."""
    return (unpack_digits(blocks[:, 2:], 4, 4, 64).float() - 1) * _scale(blocks[:, :2])


def tq2_0(codes_N256: Tensor, scale_N: Tensor) -> Tensor:
    """[N, 66]: of either half the codes m, m + 32, m + 64 and m + 96 in byte m, the first lowest, stored as 0 to 2; then d."""
    digits = codes_N256.add(1).byte().view(-1, 2, 4, 32).transpose(2, 3)
    return _joined(pack_digits(digits.reshape(-1, 256), 4, 4), scale_N)


def tq1_0(codes_N256: Tensor, scale_N: Tensor) -> Tensor:
    """[N, 54]: five digits of base 3 a byte, 32 then 16 bytes of them, 4 bytes of four, as fractions of 243 in 256; then d."""
    import torch

    digits = codes_N256.add(1).int()
    parts = []
    for start, width, count in ((0, 32, 5), (160, 16, 5), (240, 4, 4)):
        places = digits[:, start : start + width * count].view(-1, count, width)
        number = sum(places[:, i] * 3 ** (4 - i) for i in range(count))
        parts.append(torch.div(number * 256 + 242, 243, rounding_mode="floor").byte())
    return _joined(*parts, scale_N)


def stq1_0(codes_N256: Tensor, scale_N: Tensor) -> Tensor:
    """[N, 42]: slots of four codes, two a byte, the even in the low half; their signs, a bit each; then d (see `pack_quads`).

    Raises:
        NumericError: not just one of the four is zero.
    """
    slots, signs = pack_quads(_strided(codes_N256).flatten(1))
    return _joined(pack_digits(slots, 16, 2), pack_digits(signs, 2, 8), scale_N)


def from_stq1_0(blocks: Tensor) -> Tensor:
    """fp32 weights [N, 256] of blocks [N, 42]."""
    quads = unpack_quads(unpack_digits(blocks[:, :32], 16, 2, 64), unpack_digits(blocks[:, 32:40], 2, 8, 64))
    return quads.view(-1, 4, 16, 4).transpose(2, 3).reshape(-1, 256).float() * _scale(blocks[:, 40:])


def is_strided(codes_N256: Tensor) -> bool:
    """Whether STQ1_0 holds ternary codes: one zero in every four that lie 16 apart."""
    return bool(((_strided(codes_N256) == 0).sum(-1) == 1).all())


def _strided(codes_N256: Tensor) -> Tensor:
    """[N, 64, 4]: quad q has the weights (q // 16) * 64 + q % 16 + 16 p."""
    return codes_N256.reshape(-1, 4, 4, 16).transpose(2, 3).reshape(-1, 64, 4)


def _joined(*parts: Tensor) -> Tensor:
    import torch

    return torch.cat([p.half().reshape(-1, 1).view(torch.uint8) if p.is_floating_point() else p for p in parts], -1)


def _scale(data_N2: Tensor) -> Tensor:
    import torch

    return data_N2.contiguous().view(torch.float16).float()
