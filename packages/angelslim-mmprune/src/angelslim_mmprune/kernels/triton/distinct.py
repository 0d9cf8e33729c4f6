"""Tokens without near copies on a GPU: all cosines by tensor cores, then two launches a round, of which the host knows how many there are.

The first finds for every other token the nearest of those between, many programs at once; the second, a program a pool, takes the nearest away and
closes the gaps.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import of_host
from ..distinct import rounds
from .mmr import _key, cosines, held_by

# tokens of a program of `_near`, and tokens between that it looks at at a time
ROWS, COLUMNS = 8, 256


@triton.jit(do_not_specialize=["turn"])
def _near(gram, rest, near, left, turn, pools, tokens, stride, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of tokens at even places [P, width / 2]: the largest cosine to one at an odd place."""
    p, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(left + turn * pools + b)
    a = p * ROWS + tl.arange(0, ROWS)
    here = a < (count + 1) // 2
    if p * ROWS < (count + 1) // 2:
        rest += ((turn % 2) * pools + b) * width
        row = gram + (b * tokens + tl.load(rest + 2 * a, here, 0).to(tl.int64)) * stride
        highest = tl.full([ROWS, COLUMNS], -2.0, tl.float32)
        for start in range(0, count // 2, COLUMNS):
            c = start + tl.arange(0, COLUMNS)
            between = c < count // 2
            j = tl.load(rest + 2 * c + 1, between, 0)
            highest = tl.maximum(highest, tl.load(row[:, None] + j[None, :], here[:, None] & between[None, :], -2.0))
        tl.store(near + b * (width // 2) + a, tl.max(highest, 1), here)


@triton.jit(do_not_specialize=["turn"])
def _drop(rest, near, left, drops, turn, pools, width, BH: tl.constexpr):
    """The nearest go, of equal ones the first; the others move up, into the buffer of the next round."""
    b = tl.program_id(0).to(tl.int64)
    count = tl.load(left + turn * pools + b)
    a = tl.arange(0, BH)
    even, odd = a < (count + 1) // 2, a < count // 2
    key = _key(tl.load(near + b * (width // 2) + a, even, 0.0), a, even)
    goes = a < 0
    for _ in range(tl.load(drops + turn * pools + b)):
        best = tl.max(key, 0)
        goes = goes | (key == best)  # no two keys are the same but of what is not there
        key = tl.where(key == best, -0x7FFFFFFFFFFFFFFF, key)
    gone = tl.cumsum(goes.to(tl.int32), 0)
    old, new = rest + ((turn % 2) * pools + b) * width, rest + (((turn + 1) % 2) * pools + b) * width
    tl.store(new + 2 * a - gone, tl.load(old + 2 * a, even, 0), even & (~goes))
    tl.store(new + 2 * a + 1 - gone, tl.load(old + 2 * a + 1, odd, 0), odd)


def distinct(features: Tensor, tokens: Tensor, sizes: Sequence[int], counts: Sequence[int], wanted: Sequence[int], step: int) -> Tensor:
    """As the reference."""
    device, pools, most = features.device, len(features), max(wanted, default=0)
    if not most:
        return tokens[:, :0]
    features = features if features.stride(-1) == 1 else features.contiguous()
    goings = rounds(counts, wanted, step)
    left = [[n if k else 0 for n, k in zip(counts, wanted, strict=True)]]
    for going in goings:
        left.append([n - gone for n, gone in zip(left[-1], going, strict=True)])
    # one copy to the device for all rounds
    numbers = of_host([n for line in [*left, *goings] for n in line] + [*sizes], device, torch.int32)
    on_left, on_drops, on_sizes = numbers.split([len(left) * pools, len(goings) * pools, pools])
    width = -(-max(1, tokens.shape[1]) // 2) * 2
    rest = torch.zeros(2, pools, width, dtype=torch.int32, device=device)
    rest[0, :, : tokens.shape[1]] = tokens
    near = torch.empty(pools, width // 2, device=device)
    lanes, warps = held_by(width // 2)
    with torch.cuda.device_of(features):
        gram, _ = cosines(features, on_sizes)
        for turn, line in enumerate(left[:-1]):
            grid = (-(-max(line) // (2 * ROWS)), pools)
            _near[grid](gram, rest, near, on_left, turn, pools, *gram.shape[1:], width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
            _drop[(pools,)](rest, near, on_left, on_drops, turn, pools, width, BH=lanes, num_warps=max(4, warps))
    found = rest[len(goings) % 2, :, :most].long()
    return torch.where(torch.arange(most, device=device) < on_left[-pools:, None], found, -1)
