"""What a round leaves, a program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _settle(
    tokens, accepted, following, counts, stops, last, remaining, out, emitted, kept, proposals, num_stops, ts_b, ts_t, os,
    COUNTS: tl.constexpr, STOPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    b, t = tl.program_id(0), tl.arange(0, W)
    taken, left = tl.load(accepted + b), tl.load(remaining + b)
    token = tl.where(t < taken, tl.load(tokens + b * ts_b + t * ts_t, t < proposals, 0), tl.load(following + b))
    count = tl.minimum(taken + 1, left)
    s = tl.arange(0, STOPS)
    is_stop = (token[:, None] == tl.load(stops + s, s < num_stops, 0)[None, :]) & (s < num_stops)[None, :]
    is_stop = (tl.max(is_stop.to(tl.int32), 1) > 0) & (t < count)
    first = tl.min(tl.where(is_stop, t, W), 0)
    stay = tl.minimum(count, first + 1)
    goes_on = (count < left) & (first >= count)
    inside = t <= proposals
    tl.store(emitted + b * (proposals + 1) + t, token, inside)
    tl.store(kept + b, stay)
    tl.store(remaining + b, tl.where(goes_on, left - stay, 0))
    tl.store(last + b, tl.sum(tl.where(t == tl.maximum(stay - 1, 0), token, 0), 0))
    out += b * os
    tl.store(out, taken)
    tl.store(out + 1, stay)
    tl.store(out + 2, tl.load(counts + b) if COUNTS else proposals)
    tl.store(out + 3, goes_on.to(tl.int64))
    tl.store(out + 4 + t, token, inside)


def settle(
    tokens: Tensor, accepted: Tensor, following: Tensor, counts: Tensor | None, stops: Tensor, last: Tensor, remaining: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference."""
    batch, proposals = tokens.shape
    emitted, kept = tokens.new_empty(batch, proposals + 1), torch.empty_like(accepted)
    with torch.cuda.device_of(tokens):
        _settle[(batch,)](
            tokens, accepted, following, accepted if counts is None else counts, stops, last, remaining, out, emitted, kept, proposals, len(stops),
            *tokens.stride(), out.stride(0), COUNTS=counts is not None, STOPS=triton.next_power_of_2(max(1, len(stops))),
            W=triton.next_power_of_2(proposals + 1), num_warps=1,
        )  # fmt: skip
    return emitted, kept
