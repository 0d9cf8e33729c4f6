"""Blocks of FP4 or FP8 values: of several scales of each the one of least error, and the codes under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.rounding import E2M1_MAX, E4M3_MAX, cast_e4m3, e2m1_codes, e8m0_codes, round_e2m1
from angelslim_core.schemes import Grid, pieces, scale_values

from .amax import amax_of, grouped

# positive finite E4M3 bytes: 2^-9 to 448; powers of two of E8M0 that are normal fp32 numbers
E4M3_BYTES, E8M0_CODES = (0x01, 0x7E), (1, 254)
# least and largest power of two below an element value, its steps in parts of that, the largest value
ELEMENTS = {4: (1.0, 4.0, 0.5, E2M1_MAX), 8: (2.0**-6, 256.0, 0.125, E4M3_MAX)}


def round_to(values: Tensor, grid: Grid) -> Tensor:
    """Element values of a grid nearest to `values`, fp32."""
    return round_e2m1(values) if grid.bits == 4 else cast_e4m3(values).float()


def stored_codes(values: Tensor, grid: Grid) -> Tensor:
    """Element values as the codes that are stored."""
    return e2m1_codes(values) if grid.bits == 4 else cast_e4m3(values)


def steps(scale_OG: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """What a block's element values are multiplied by, fp32."""
    return scale_values(scale_OG) if global_scale is None else scale_values(scale_OG) * global_scale


def candidate(amax: Tensor, start: Tensor, offset: int, nested: bool) -> Tensor:
    """Scales as many codes from where a search starts; blocks of zeros keep scale 1."""
    least, most = E4M3_BYTES if nested else E8M0_CODES
    codes = (start.int() + offset).clamp(least, most).to(torch.uint8)
    return codes.masked_fill_(amax == 0, 0x38).view(torch.float8_e4m3fn) if nested else codes.masked_fill_(amax == 0, 127)


def first_scale(amax: Tensor, grid: Grid, global_scale: Tensor | None, rounding: Literal["up", "down"]) -> Tensor:
    """Codes, uint8, of absmax / largest value: rounded to E4M3 under a global scale, to a power of two without."""
    if global_scale is None:
        return e8m0_codes(amax, E2M1_MAX if grid.bits == 4 else E4M3_MAX, rounding)
    # a tensor on the device: PyTorch multiplies by the inverse of a number on GPUs, which is another result
    return cast_e4m3(amax / amax.new_full((), E2M1_MAX) / global_scale).view(torch.uint8)


def reference(
    weight_OI: Tensor, grid: Grid, global_scale: Tensor | None, importance_I: Tensor | None, offsets: Sequence[int], rounding: Literal["up", "down"] = "up"
) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [O, G]: E4M3 with a global scale, else E8M0 (uint8).

    Args:
        weight_OI: any float dtype, finite.
        grid: 4 or 8 bits in groups.
        global_scale: fp32 [1], multiplies block scales.
        importance_I: weight of the squared error of each input, 1 if not given.
        offsets: candidates, in codes from absmax / largest value; the first of least error is taken.
        rounding: of the power of two of absmax / largest value.
    """
    values = grouped(weight_OI.float(), grid)
    weights = None if importance_I is None else importance_I.float().view(-1, values.shape[-1])
    amax, nested = amax_of(weight_OI, grid), global_scale is not None
    start = first_scale(amax, grid, global_scale, rounding)
    best = chosen = None
    for offset in offsets:
        scale = candidate(amax, start, offset, nested)
        step = steps(scale, global_scale)[..., None]
        error = round_to(values / step, grid).mul_(step).sub_(values).square_()
        found = (error if weights is None else error.mul_(weights)).sum(-1)
        if best is None or chosen is None:
            best, chosen = found, scale
            continue
        better = found < best
        best = torch.where(better, found, best)
        chosen = torch.where(better, scale.view(torch.uint8), chosen.view(torch.uint8)).view(scale.dtype)
    assert chosen is not None
    codes = stored_codes(round_to(values / steps(chosen, global_scale)[..., None], grid), grid)
    return codes.reshape(weight_OI.shape), chosen


def _torch(
    weight_OI: Tensor, grid: Grid, global_scale: Tensor | None, importance_I: Tensor | None, offsets: Sequence[int], rounding: Literal["up", "down"] = "up"
) -> tuple[Tensor, Tensor]:
    """Some rows at a time; a search has a block a column: what blocks share broadcasts along memory, and sums run across it."""
    size, nested, device = grid.group_size, global_scale is not None, weight_OI.device
    assert size
    outputs, inputs = weight_OI.shape
    codes = torch.empty(outputs, inputs, dtype=torch.uint8, device=device)
    scales = torch.empty(outputs, inputs // size, dtype=torch.uint8, device=device)
    least, most = E4M3_BYTES if nested else E8M0_CODES
    table = None if global_scale is None else torch.arange(0x7F, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float() * global_scale
    weights = None
    for rows in pieces(weight_OI, grid):
        blocks = weight_OI[rows].reshape(-1, size)
        values = blocks.float()
        # the bits of magnitudes are in their order, and a short axis of integers is reduced faster
        amax = values.abs().view(torch.int32).amax(1).view(torch.float32)
        start = first_scale(amax, grid, global_scale, rounding).int()
        chosen = (start + offsets[0]).clamp_(least, most)
        if len(offsets) > 1:
            if importance_I is not None and (weights is None or weights.shape[1] != len(blocks)):
                weights = importance_I.float().view(-1, size).T.repeat(1, rows.stop - rows.start)
            trial, best = _Trial(blocks.T.contiguous().float().abs_(), grid.bits), None
            for offset in offsets:
                code = (start + offset).clamp_(least, most)
                error = trial.squares((code << 23).view(torch.float32) if table is None else table.index_select(0, code))
                found = (error if weights is None else error.mul_(weights)).sum(0)
                if best is None:
                    best = found
                    continue
                chosen = torch.where(found < best, code, chosen)
                best = torch.minimum(best, found)
        # blocks of zeros keep scale 1
        chosen.masked_fill_(amax == 0, 0x38 if nested else 127)
        scales[rows] = chosen.view(-1, inputs // size)
        step = (chosen << 23).view(torch.float32) if table is None else table.index_select(0, chosen)
        values = values / step[:, None]
        found_codes = e2m1_codes(round_e2m1(values)) if grid.bits == 4 else cast_e4m3(values).view(torch.uint8)
        codes[rows] = found_codes.view(-1, inputs)
    return (codes if grid.bits == 4 else codes.view(torch.float8_e4m3fn)), (scales.view(torch.float8_e4m3fn) if nested else scales)


class _Trial:
    """Squared errors of magnitudes [size, blocks] under a step a block; the memory of one trial serves the next."""

    def __init__(self, magnitudes: Tensor, bits: int) -> None:
        self.magnitudes, self.negative = magnitudes, -magnitudes
        self.least, self.most, self.part, self.largest = ELEMENTS[bits]
        self.scaled, self.magic = torch.empty_like(magnitudes), torch.empty_like(magnitudes)
        self.scaled_bits, self.magic_bits = self.scaled.view(torch.int32), self.magic.view(torch.int32)

    def squares(self, step: Tensor) -> Tensor:
        scaled, magic = self.scaled, self.magic
        torch.div(self.magnitudes, step, out=scaled).clamp_max_(self.largest)
        # as `round_e2m1`: what is added to 1.5 * 2^23 steps is rounded to whole ones, ties to even
        torch.bitwise_and(self.scaled_bits, 0x7F800000, out=self.magic_bits)
        magic.clamp_(self.least, self.most).mul_(self.part * 1.5 * 2**23)
        scaled.add_(magic).sub_(magic)
        return torch.addcmul(self.negative, scaled, step, out=scaled).square_()


def _triton(
    weight_OI: Tensor, grid: Grid, global_scale: Tensor | None, importance_I: Tensor | None, offsets: Sequence[int], rounding: Literal["up", "down"] = "up"
) -> tuple[Tensor, Tensor]:
    from .triton.search_blocks import search_blocks

    return search_blocks(weight_OI, grid, global_scale, importance_I, offsets, rounding)


def _on_gpu(weight_OI: Tensor, grid: Grid, *_: object) -> tuple[bool, str]:
    return weight_OI.is_cuda and grid.group_size in (16, 32, 64), "blocks of 16, 32 or 64 on a GPU"


SEARCH_BLOCKS = Kernel("quant.search_blocks", reference, (Implementation("triton", _triton, _on_gpu, triton_runs), Implementation("torch", _torch)))
