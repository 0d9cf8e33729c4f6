"""Groups of neighbours in one pass over the tokens, a program a clip: the open group's sum of unit vectors stays in registers.

Their means: a program a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _groups(x, scale, counts, segments, scores, threshold, width, sx_b, sx_n, ss_b, sg_b, sg_n, SEGMENTS: tl.constexpr, BD: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    tokens = tl.load(counts + b).to(tl.int32)
    x += b * sx_b + d
    scale += b * ss_b
    segments += b * sg_b
    total = tl.load(x, d < tl.where(tokens > 0, width, 0), 0.0).to(tl.float32) * tl.load(scale)
    size = tl.full([], 1.0, tl.float32)
    # a token is asked for while the one before it is looked at
    following = tl.load(x + sx_n, d < tl.where(tokens > 1, width, 0), 0.0).to(tl.float32)
    factor = tl.load(scale + 1, tokens > 1, 0.0)
    for j in range(1, tokens):
        token = following * factor
        following = tl.load(x + (j + 1) * sx_n, d < tl.where(j + 1 < tokens, width, 0), 0.0).to(tl.float32)
        factor = tl.load(scale + j + 1, j + 1 < tokens, 0.0)
        mean = tl.minimum(tl.maximum(tl.sum(token * total, 0) / size, -1.0), 1.0)
        joins = mean >= threshold
        if SEGMENTS:
            joins = joins & (tl.load(segments + j * sg_n) == tl.load(segments + (j - 1) * sg_n))
        tl.store(scores + b * ss_b + j, tl.where(joins, (size * mean + 1) / (size + 1), float("inf")))
        total = tl.where(joins, total + token, token)
        size = tl.where(joins, size + 1, 1.0)


def groups(features: Tensor, scale: Tensor, counts: Tensor, threshold: float, segments: Tensor | None) -> Tensor:
    """As `samp.reference`; scale [P, N] makes tokens' lengths 1."""
    clips, tokens, width = features.shape
    scores = torch.full((clips, tokens), float("inf"), device=features.device)
    if not scores.numel():
        return scores
    scale = scale.contiguous()
    looked_at = counts[:, None] if segments is None else segments
    with torch.cuda.device_of(features):
        _groups[(clips,)](
            features, scale, counts, looked_at, scores, float(threshold), width, *features.stride()[:2], tokens, *looked_at.stride(),
            SEGMENTS=segments is not None, BD=triton.next_power_of_2(width), num_warps=8 if width <= 4096 else 16,
        )  # fmt: skip
    return scores


@triton.jit
def _merge(x, group, shares, counts, out, width, sx_b, sx_n, ss_b, so_b, so_n, BD: tl.constexpr):
    first, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = tl.load(counts + b).to(tl.int32)
    if first >= tokens:
        return
    group += b * ss_b
    shares += b * ss_b
    number = tl.load(group + first)
    before = tl.load(group + first - 1, first > 0, -1)
    if before == number:
        return
    end = first + 1
    while (end < tokens) & (tl.load(group + tl.minimum(end, tokens - 1)) == number):
        end += 1
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        ok = d < width
        total = tl.zeros([BD], tl.float32)
        for j in range(first, end):
            total += tl.load(x + b * sx_b + j * sx_n + d, ok, 0.0).to(tl.float32) * tl.load(shares + j)
        tl.store(out + b * so_b + number * so_n + d, total, ok)


def merge(features: Tensor, group: Tensor, shares: Tensor, counts: Tensor) -> Tensor:
    """As `samp.merge`."""
    clips, tokens, width = features.shape
    out = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    if out.numel():
        group, shares = group.contiguous(), shares.contiguous()
        with torch.cuda.device_of(features):
            _merge[(tokens, clips)](
                features, group, shares, counts, out, width, *features.stride()[:2], tokens, *out.stride()[:2],
                BD=min(2048, triton.next_power_of_2(width)), num_warps=4,
            )  # fmt: skip
    return out
