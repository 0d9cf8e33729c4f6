"""Acceptance from logits without probabilities in memory: pieces of the vocabulary side by side, then a program for each row.

Shapes: B rows, K proposed tokens, V vocabulary, P pieces of it, Vd columns of q. Sums are in FP64, as those of the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# tokens of a piece
PIECE = 2048


@triton.jit
def best_of_piece(logits, values, numbers, vocabulary, ls_b, ls_t, tokens, PIECE: tl.constexpr):
    piece, row = tl.program_id(0), tl.program_id(1)
    v = piece * PIECE + tl.arange(0, PIECE)
    at = logits + (row // tokens).to(tl.int64) * ls_b + (row % tokens).to(tl.int64) * ls_t + v
    value, number = tl.max(tl.load(at, v < vocabulary, float("-inf")).to(tl.float32), 0, return_indices=True)
    here = row * tl.num_programs(0) + piece
    tl.store(values + here, value)
    tl.store(numbers + here, piece * PIECE + number)


@triton.jit
def _greedy(
    values, numbers, proposed, counts, accepted, following, pieces, vocabulary, proposals, ps_b, ps_t,
    COUNTS: tl.constexpr, TP: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    t, piece = tl.arange(0, TP), tl.arange(0, NP)
    at = (b * (proposals + 1) + t)[:, None] * pieces + piece[None, :]
    there = (t <= proposals)[:, None] & (piece < pieces)[None, :]
    value = tl.load(values + at, there, float("-inf"))
    number = tl.load(numbers + at, there, 0)
    # of equals the first; where nothing is a number, any token
    choice = tl.min(tl.where(value == tl.max(value, 1)[:, None], number, vocabulary - 1), 1)
    said = tl.load(proposed + b * ps_b + t * ps_t, t < proposals, -1)
    real = tl.load(counts + b) if COUNTS else proposals
    taken = tl.min(tl.where((choice == said) & (t < real) & (t < proposals), TP, t), 0)
    tl.store(accepted + b, taken.to(tl.int64))
    tl.store(following + b, tl.sum(tl.where(t == taken, choice, 0), 0).to(tl.int64))


@triton.jit
def _levels(logits, highs, sums, temperature, vocabulary, ls_b, ls_t, tokens, PIECE: tl.constexpr):
    # highest logit of a piece, and the sum of exponentials below it
    piece, row = tl.program_id(0), tl.program_id(1)
    v = piece * PIECE + tl.arange(0, PIECE)
    at = logits + (row // tokens).to(tl.int64) * ls_b + (row % tokens).to(tl.int64) * ls_t + v
    z = tl.load(at, v < vocabulary, float("-inf")).to(tl.float32) / temperature
    high = tl.max(z, 0)
    here = row * tl.num_programs(0) + piece
    tl.store(highs + here, high)
    tl.store(sums + here, tl.sum(tl.exp(z - tl.where(high == float("-inf"), 0.0, high)), 0))


@triton.jit
def _of_draft(q, columns, token, wanted, width, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    # q of tokens, from q's rows at pointers `q`; 0 where the draft has no such token
    at = token
    if COLUMNS:
        low = tl.zeros_like(token)
        high = low + width
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            right = tl.load(columns + middle, wanted & (low < high), 0) < token
            low, high = tl.where(right & (low < high), middle + 1, low), tl.where(right, high, middle)
        at = low
        wanted = wanted & (low < width)
        wanted = wanted & (tl.load(columns + low, wanted, 0) == token)
    return tl.load(q + at, wanted, 0.0)


@triton.jit
def _weights(
    logits, q, columns, v, high, total, said, temperature, vocabulary, width,
    HAS_Q: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # p of tokens v, and what refusal leaves of it
    inside = v < vocabulary
    z = tl.load(logits + v, inside, float("-inf")).to(tl.float32) / temperature
    p = tl.exp(z - high) / total
    if HAS_Q:
        left = tl.maximum(p - _of_draft(q, columns, v, inside, width, COLUMNS, STEPS), 0.0)
    else:
        left = tl.where(v == said, 0.0, p)
    return p, left


@triton.jit
def _decide(
    logits, highs, sums, proposed, q, columns, uniforms, counts, accepted, state, masses, temperature, vocabulary, width, pieces, proposals,
    ls_b, ls_t, ps_b, ps_t, qs_b, qs_t, us_b, us_t,
    HAS_Q: tl.constexpr, COLUMNS: tl.constexpr, COUNTS: tl.constexpr, STEPS: tl.constexpr, PIECE: tl.constexpr, TP: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    # each program decides for itself, so that none has to wait; then sums over its own piece
    own, b = tl.program_id(0), tl.program_id(1)
    t, piece = tl.arange(0, TP), tl.arange(0, NP)
    at = (b * (proposals + 1) + t)[:, None] * pieces + piece[None, :]
    there = (t <= proposals)[:, None] & (piece < pieces)[None, :]
    high = tl.load(highs + at, there, float("-inf"))
    most = tl.max(high, 1)
    total = tl.sum(tl.load(sums + at, there, 0.0) * tl.exp(high - tl.where(t <= proposals, most, 0.0)[:, None]), 1)

    drafted = t < proposals
    said = tl.maximum(tl.load(proposed + b * ps_b + t * ps_t, drafted, 0), 0).to(tl.int32)
    logits += b.to(tl.int64) * ls_b
    z = tl.load(logits + t.to(tl.int64) * ls_t + said, drafted, float("-inf")).to(tl.float32) / temperature
    of_p = tl.exp(z - tl.where(drafted, most, 0.0)) / tl.where(drafted, total, 1.0)
    of_q = tl.full([TP], 1.0, tl.float32)
    if HAS_Q:
        q += b.to(tl.int64) * qs_b
        of_q = _of_draft(q + t.to(tl.int64) * qs_t, columns, said, drafted, width, COLUMNS, STEPS)
    u = tl.load(uniforms + b * us_b + t * us_t, drafted, 0.0)
    real = tl.load(counts + b).to(tl.int32) if COUNTS else proposals
    taken = tl.min(tl.where((u * of_q <= of_p) & (of_p > 0) & drafted & (t < real), TP, t), 0)

    here = t == taken
    high_there, total_there = tl.max(tl.where(here, most, float("-inf")), 0), tl.sum(tl.where(here, total, 0.0), 0)
    said_there = tl.sum(tl.where(here, said, 0), 0)
    refused = (taken < real) & (taken < proposals)
    if HAS_Q:
        q += tl.minimum(taken, tl.maximum(proposals - 1, 0)).to(tl.int64) * qs_t
    v = own * PIECE + tl.arange(0, PIECE)
    p, left = _weights(
        logits + taken.to(tl.int64) * ls_t, q, columns, v, high_there, total_there, said_there, temperature, vocabulary, width, HAS_Q, COLUMNS, STEPS
    )
    masses += b * 2 * pieces + own
    tl.store(masses, tl.sum(p.to(tl.float64), 0))
    tl.store(masses + pieces, tl.sum(left.to(tl.float64), 0))
    if own == 0:
        tl.store(accepted + b, taken.to(tl.int64))
        tl.store(state + b * 3, high_there)
        tl.store(state + b * 3 + 1, total_there)
        tl.store(state + b * 3 + 2, tl.where(refused, 1.0, 0.0))


@triton.jit
def _draw(
    logits, proposed, q, columns, uniform, accepted, state, masses, following, temperature, vocabulary, width, pieces, proposals,
    ls_b, ls_t, ps_b, ps_t, qs_b, qs_t, us_b,
    HAS_Q: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, PIECE: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    piece = tl.arange(0, NP)
    taken = tl.load(accepted + b)
    at = masses + b * 2 * pieces + piece
    of_p = tl.load(at, piece < pieces, 0.0)
    of_left = tl.load(at + pieces, piece < pieces, 0.0)
    refused = tl.load(state + b * 3 + 2) > 0
    # what rounding leaves of p = q may be nothing at all
    from_left = refused & (tl.sum(of_left, 0) > 0)
    below = tl.cumsum(tl.where(from_left, of_left, of_p), 0)
    goal = tl.load(uniform + b * us_b).to(tl.float64) * tl.max(below, 0)
    found = tl.minimum(tl.min(tl.where(below > goal, piece, NP), 0), pieces - 1)
    before = tl.max(tl.where(piece < found, below, 0.0), 0)

    last = tl.minimum(taken, tl.maximum(proposals - 1, 0))
    said = tl.load(proposed + b * ps_b + last * ps_t, refused, 0)
    if HAS_Q:
        q += b.to(tl.int64) * qs_b + last * qs_t
    v = found * PIECE + tl.arange(0, PIECE)
    p, left = _weights(
        logits + b.to(tl.int64) * ls_b + taken * ls_t, q, columns, v, tl.load(state + b * 3), tl.load(state + b * 3 + 1),
        tl.maximum(said, 0).to(tl.int32), temperature, vocabulary, width, HAS_Q, COLUMNS, STEPS,
    )  # fmt: skip
    weight = tl.where(from_left, left, p)
    reached = (before + tl.cumsum(weight.to(tl.float64), 0) > goal) & (weight > 0)
    first = tl.min(tl.where(reached, v, vocabulary), 0)
    # the piece's sum and that of its steps may differ in their last digits: then its last token that has any weight
    rest = tl.maximum(tl.max(tl.where(weight > 0, v, -1), 0), 0)
    tl.store(following + b, tl.where(first < vocabulary, first, rest).to(tl.int64))


def accept_greedy(logits: Tensor, tokens: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the reference."""
    batch, places, vocabulary = logits.shape
    pieces = triton.cdiv(vocabulary, PIECE)
    wide_t, wide_p = triton.next_power_of_2(places), triton.next_power_of_2(pieces)
    values = logits.new_empty(batch * places, pieces, dtype=torch.float32)
    numbers = torch.empty_like(values, dtype=torch.int32)
    accepted, following = (torch.empty(batch, dtype=torch.int64, device=logits.device) for _ in range(2))
    with torch.cuda.device_of(logits):
        best_of_piece[(pieces, batch * places)](logits, values, numbers, vocabulary, *logits.stride()[:2], places, PIECE=PIECE, num_warps=8)
        _greedy[(batch,)](
            values, numbers, tokens, tokens if counts is None else counts, accepted, following, pieces, vocabulary, places - 1, *tokens.stride(),
            COUNTS=counts is not None, TP=wide_t, NP=wide_p, num_warps=min(8, max(1, wide_t * wide_p // 512)),
        )  # fmt: skip
    return accepted, following


def accept_ratio(
    logits: Tensor, temperature: float, tokens: Tensor, q: Tensor | None, columns: Tensor | None, uniforms: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference, of the logits divided by the temperature."""
    batch, places, vocabulary = logits.shape
    pieces, device = triton.cdiv(vocabulary, PIECE), logits.device
    highs, sums = (torch.empty(batch * places, pieces, dtype=torch.float32, device=device) for _ in range(2))
    state = torch.empty(batch, 3, dtype=torch.float32, device=device)
    masses = torch.empty(batch, 2, pieces, dtype=torch.float64, device=device)
    accepted, following = (torch.empty(batch, dtype=torch.int64, device=device) for _ in range(2))
    width = 0 if q is None else q.shape[2]
    drawn_from, q_strides = (logits, (0, 0)) if q is None else (q, q.stride()[:2])
    of = tokens if columns is None else columns
    sizes = (temperature, vocabulary, width, pieces, places - 1, *logits.stride()[:2], *tokens.stride(), *q_strides)
    kinds = {"HAS_Q": q is not None, "COLUMNS": columns is not None, "STEPS": width.bit_length(), "PIECE": PIECE, "NP": triton.next_power_of_2(pieces)}
    with torch.cuda.device_of(logits):
        _levels[(pieces, batch * places)](logits, highs, sums, temperature, vocabulary, *logits.stride()[:2], places, PIECE=PIECE, num_warps=8)
        _decide[(pieces, batch)](
            logits, highs, sums, tokens, drawn_from, of, uniforms, tokens if counts is None else counts, accepted, state, masses, *sizes, *uniforms.stride(),
            COUNTS=counts is not None, TP=triton.next_power_of_2(places), **kinds, num_warps=8,
        )  # fmt: skip
        last = uniforms[:, -1]
        _draw[(batch,)](logits, tokens, drawn_from, of, last, accepted, state, masses, following, *sizes, last.stride(0), **kinds, num_warps=8)
    return accepted, following
