"""Products with weights of at most four levels, read in 2 bits a weight, or in 5 bits for four of which just three are not zero.

y = x W^T + bias, x in 16 bits. Shapes: N rows, O out features, I in features, G groups, C chunks of 128 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from angelslim_core.errors import ModelError
from angelslim_core.kernels import Implementation, Kernel, triton_runs
from angelslim_core.schemes import Grid, Quantized, scale_values

from .available import lowbit_mma
from .int4_matmul import Packed4CPU, _int4pack

# outputs and inputs of a warp's words
TILE, CHUNK = 32, 128
# inputs that share a scale; 0: all of them
GROUPS = (0, 32, 64, 128, 256)
# an input as mma.sync reads it is one of 32; rows of other lengths would need a filled up copy
INPUTS = 32
# from that many rows on the weight is widened for one call and multiplied by cuBLAS (benchmarks/lowbit_gpu.py --tune)
WIDE_ROWS = 65
_HINT = "the file is damaged, or was written for another scheme"


def levels(grid: Grid) -> tuple[int, ...]:
    """The codes of a grid, ascending."""
    return grid.levels or tuple(range(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)))


def group(grid: Grid) -> int:
    """Inputs that share a scale; 0: all of them."""
    return grid.group_size or 0 if grid.strategy == "group" else 0


def in_five_bits(grid: Grid) -> bool:
    """Whether four weights are stored in 5 bits: then a scale belongs to whole halves of a chunk."""
    return grid.sparsity == (3, 4) and levels(grid) == (-1, 0, 1) and group(grid) % 64 == 0


class PackedLow(NamedTuple):
    """Weights of at most four levels in the order in which the threads of a warp hold the left factor of PTX's mma.sync.m16n8k16.

    A code is an index into the levels. Thread 4 g + q holds outputs g + 8 r + 16 t of a tile, r and t from 0 and 1, and of each
    fourth part `sub` of a chunk inputs 8 q + i, i < 8. A code of output r takes the bits `place(r, i)` and one above, counted in a circle.

    Args:
        words: int32. [O / 32, C, 2, 32, 4], two bits a weight: of half sub // 2 and thread word 2 (sub % 2) + t, 16 codes by r and i.
            [O / 32, C, 160], five bits for four weights (-1, 0, 1): of thread l words 4 l to 4 l + 3, and 128 + l, are five planes
            of 32 bits; the bit `place(r, i')` + t of all is of the four inputs 4 e to 4 e + 3 of a part, i' = 2 sub + e. The first two say
            which of them is zero; the others that the first, the second and the third are 1, where one of these is zero that the fourth is.
        scale: [O / 32, G, 8, 4] of outputs g, g + 8, g + 16 and g + 24, in the model's dtype or fp32, times the step between levels.
        zero: value = (code - zero) * scale.
        inputs: I, a multiple of 32; chunks are filled up.
        group: inputs that share a scale, 0: all.
    """

    words: Tensor
    scale: Tensor
    zero: float
    inputs: int
    group: int

    @property
    def outputs(self) -> int:
        """O."""
        return self.words.shape[0] * TILE

    @property
    def sparse(self) -> bool:
        """Whether four weights are 5 bits."""
        return self.words.dim() == 3

    @property
    def chunks(self) -> int:
        """C."""
        return self.words.shape[1]


def place(r: int, i: int) -> int:
    """The lower bit of a code: bits 3 to 6 of both halves of a word, turned right by 0, 4, 8 and 12, are two pairs of codes."""
    return (16 * (i % 2) + 4 * (2 * (i // 4) + r) + 5 - 2 * (i // 2 % 2)) % 32


def pack_low(quantized: Quantized) -> PackedLow:
    """Repack codes [O, I], O and I multiples of 32, on whatever device they are.

    Raises:
        ModelError: a code is none of the levels, or a sparse weight is not.
    """
    grid = quantized.scheme.weights
    codes, inputs = level_codes(quantized), quantized.codes.shape[1]
    codes = pad(codes, (0, -inputs % CHUNK))
    steps = codes.unflatten(0, (-1, 2, 2, 8)).unflatten(4, (-1, 4, 4, 8))  # [tile, t, r, g, C, sub, q, i]
    words = _planes(steps) if in_five_bits(grid) else _pairs(steps)
    scale = quantized.scale if quantized.scale.is_floating_point() else scale_values(quantized.scale)
    scale = scale.reshape(-1, 1).expand(codes.shape[0], 1) if scale.dim() < 2 else scale
    size, first = group(grid), levels(grid)
    step = first[1] - first[0]
    if size:
        scale = pad(scale, (0, codes.shape[1] // size - scale.shape[1])) if size <= CHUNK else scale
    return PackedLow(words, (scale * step).unflatten(0, (-1, 4, 8)).permute(0, 3, 2, 1).contiguous(), -first[0] / step, inputs, size)


def level_codes(quantized: Quantized) -> Tensor:
    """Index into the levels [O, I], uint8."""
    grid = quantized.scheme.weights
    known = levels(grid)
    step = known[1] - known[0]
    shifted = quantized.codes.to(torch.int16) - known[0]
    found = shifted // step
    if bool(((shifted % step != 0) | (found < 0) | (found >= len(known))).any()):
        raise ModelError(970, quantized.scheme.name, f"a weight's codes are others than its levels {known}", _HINT)
    if in_five_bits(grid) and bool(((found == 1).unflatten(1, (-1, 4)).sum(-1) != 1).any()):
        raise ModelError(971, quantized.scheme.name, "not just one of four weights is zero", _HINT)
    return found.to(torch.uint8)


def _bits(flags: Tensor, at: int) -> Tensor:
    return flags.int() << at % 32


def _pairs(steps: Tensor) -> Tensor:
    tiles, chunks = steps.shape[0], steps.shape[4]
    words = torch.zeros(tiles, chunks, 2, 32, 4, dtype=torch.int32, device=steps.device)
    for r in range(2):
        for i in range(8):
            # [tile, t, g, C, sub, q] -> [tile, C, half, thread, word]
            codes = steps[:, :, r, ..., i].unflatten(4, (2, 2)).permute(0, 3, 4, 2, 6, 5, 1).reshape(words.shape)
            words |= _bits(codes & 1, place(r, i)) | _bits(codes >> 1, place(r, i) + 1)
    return words


def _planes(steps: Tensor) -> Tensor:
    tiles, chunks = steps.shape[0], steps.shape[4]
    fours = steps.unflatten(7, (2, 4)).permute(0, 4, 3, 6, 1, 2, 5, 7, 8).reshape(tiles, chunks, 32, 2, 2, 8, 4)  # [..., t, r, 2 sub + e, j]
    zero, ones = (fours == 1).int().argmax(-1), fours == 2
    planes = [zero & 1, zero >> 1, *(torch.where(zero == j, ones[..., 3], ones[..., j]) for j in range(3))]
    words = torch.zeros(tiles, chunks, 32, 5, dtype=torch.int32, device=steps.device)
    for p, t, r, i in ((p, t, r, i) for p in range(5) for t in range(2) for r in range(2) for i in range(8)):
        words[..., p] |= _bits(planes[p][..., t, r, i], place(r, i) + t)
    return torch.cat([words[..., :4].flatten(2), words[..., 4]], 2)


def unpack_codes(weight: PackedLow) -> Tensor:
    """Index into the levels [O, I], uint8."""
    tiles, chunks = weight.words.shape[:2]
    if weight.sparse:
        codes = _from_planes(weight.words)
    else:
        words = weight.words.unflatten(3, (8, 4)).unflatten(5, (2, 2))  # [tile, C, half, g, q, sub of half, t]
        pairs = torch.stack([torch.stack([_code(words, place(r, i)) for i in range(8)], -1) for r in range(2)], -2)
        codes = pairs.permute(0, 6, 7, 3, 1, 2, 5, 4, 8).reshape(tiles, 2, 2, 8, chunks, 4, 4, 8)
    return codes.flatten(4).flatten(0, 3)[:, : weight.inputs]


def _code(words: Tensor, at: int) -> Tensor:
    return (((words >> at % 32) & 1) | ((words >> (at + 1) % 32) & 1) << 1).to(torch.uint8)


def _from_planes(words: Tensor) -> Tensor:
    lanes = torch.cat([words[..., :128].unflatten(2, (32, 4)), words[..., 128:, None]], 3)  # [tile, C, thread, plane]
    spots = [[[place(r, i) + t for i in range(8)] for r in range(2)] for t in range(2)]
    at = torch.tensor(spots, device=words.device, dtype=torch.int32) % 32
    low, high, *signs = ((lanes[..., p, None, None, None] >> at) & 1 for p in range(5))
    zero = low + 2 * high
    last = sum((zero == j) * signs[j] for j in range(3))
    fours = torch.stack([*(torch.where(zero == j, 1, 2 * signs[j]) for j in range(3)), torch.where(zero == 3, 1, 2 * last)], -1)
    # [tile, C, thread, t, r, 2 sub + e, j] -> [tile, t, r, g, C, sub, q, i]
    return fours.unflatten(5, (4, 2)).unflatten(2, (8, 4)).permute(0, 4, 5, 2, 1, 6, 3, 7, 8).flatten(7).to(torch.uint8)


def unpack_low(weight: PackedLow, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """The weight [O, I], rounded to `dtype`; `rows` are of tiles."""
    part = weight._replace(words=weight.words[rows], scale=weight.scale[rows])
    values = unpack_codes(part).float() - weight.zero
    scale = part.scale.permute(0, 3, 2, 1).flatten(0, 2).float()
    if weight.group:
        scale = scale.repeat_interleave(weight.group, 1)[:, : weight.inputs]
    return (values * scale).to(dtype)


def reference(x_NI: Tensor, weight: PackedLow, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, O] in `dtype`: widened to fp64, multiplied, rounded once.

    Args:
        x_NI: 16 bits or fp32.
        weight: see `pack_low`.
        bias: [O].
    """
    y = x_NI.double() @ unpack_low(weight, torch.float64).T
    return (y if bias is None else y + bias).to(dtype)


def _pieces(weight: PackedLow, values: int = 1 << 22) -> Iterator[slice]:
    step = max(1, values // (TILE * weight.inputs))
    return (slice(at, at + step) for at in range(0, weight.words.shape[0], step))


def widened(x_NI: Tensor, weight: PackedLow, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Some outputs at a time, their weight in fp32, for CPUs without a kernel."""
    x = x_NI.float()
    y = torch.cat([x @ unpack_low(weight, torch.float32, rows).T for rows in _pieces(weight)], 1)
    return (y if bias is None else y + bias).to(dtype)


def _mma(x_NI: Tensor, weight: PackedLow, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    from .triton.lowbit_matmul import matmul

    return _widen(x_NI, weight, bias, dtype) if x_NI.shape[0] >= WIDE_ROWS else matmul(x_NI, weight, bias, dtype)


def _gemv(x_NI: Tensor, weight: PackedLow, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Without tensor cores, for few rows."""
    from .triton.lowbit_gemv import GEMV_ROWS, gemv

    return _widen(x_NI, weight, bias, dtype) if x_NI.shape[0] > GEMV_ROWS else gemv(x_NI, weight, bias, dtype)


def _widen(x_NI: Tensor, weight: PackedLow, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight in 16 bits for one call, multiplied by cuBLAS."""
    from .triton.lowbit_gemv import widen

    return linear(x_NI.to(dtype), widen(weight, dtype), bias)


def _int4(x_NI: Tensor, weight: Packed4CPU, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return _int4pack(x_NI, weight, bias, None, dtype)


def _is_for_cpu(x_NI: Tensor, weight: Any, *_: Any, **__: Any) -> tuple[bool, str]:
    return isinstance(weight, Packed4CPU), "BF16 on a CPU"


def _fits(x_NI: Tensor, weight: Any, *_: Any, dtype: torch.dtype = torch.bfloat16, **__: Any) -> tuple[bool, str]:
    return x_NI.is_cuda and isinstance(weight, PackedLow) and dtype in (torch.bfloat16, torch.float16), "16 bits on a GPU"


LOWBIT_MATMUL = Kernel(
    "quant.lowbit_matmul",
    reference,
    (
        Implementation("mma", _mma, _fits, lowbit_mma),
        Implementation("gemv", _gemv, _fits, triton_runs),
        Implementation("int4pack", _int4, _is_for_cpu),
        Implementation("torch", widened),
    ),
)
