"""Rounds of trees in a launch or two for each thing to do.

Shapes: B rows, N proposed tokens, V vocabulary, Vd the draft's, P pieces of it, k children of a node, W nodes that are expanded, A positions
that these see, C candidates. Numbers are ordered by keys: the value in the upper half, below it the place counted down, so that of equal
values the first is the greatest key and no two keys are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tree import MOST_KEYS, Candidates, Front, Stored
from .accept import PIECE, best_of_piece

# below every key
_NONE = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
_LAST = tl.constexpr(0x7FFFFFFF)
# tokens of a piece of the draft's vocabulary, at most
_MOST = 8192
# of the same widths in bytes
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _key(value, place):
    # bits of negative numbers fall where the numbers rise; the two zeros are equal
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ _LAST, bits)
    return (bits.to(tl.int64) << 32) | (place ^ _LAST).to(tl.int64)


@triton.jit
def _value(key):
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ _LAST, bits).to(tl.float32, bitcast=True)


@triton.jit
def _top(logits, keys, highs, sums, width, nodes, k, ls_b, ls_w, PIECE: tl.constexpr):
    # the k greatest of a piece, its highest logit, and the sum of exponentials below it
    piece, row = tl.program_id(0), tl.program_id(1)
    v = piece * PIECE + tl.arange(0, PIECE)
    at = logits + (row // nodes).to(tl.int64) * ls_b + (row % nodes).to(tl.int64) * ls_w + v
    z = tl.load(at, v < width, float("-inf")).to(tl.float32)
    high = tl.max(z, 0)
    here = row * tl.num_programs(0) + piece
    tl.store(highs + here, high)
    tl.store(sums + here, tl.sum(tl.exp(z - tl.where(high == float("-inf"), 0.0, high)), 0))
    key = tl.where(v < width, _key(z, v), _NONE)
    for i in range(k):
        best = tl.max(key, 0)
        tl.store(keys + here * k + i, best)
        key = tl.where(key == best, _NONE, key)


@triton.jit
def _level(
    keys, highs, sums, columns, numbers, reached, visible, tokens, parents, scores, sure, to_tokens, to_origin, to_numbers, to_reached, to_visible,
    pieces, width, nodes, k, base, candidates, seen,
    ROOT: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, WP: tl.constexpr, KP: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, AP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    w, i, c, p = tl.arange(0, WP), tl.arange(0, KP), tl.arange(0, NP), tl.arange(0, PP)
    row, real = b * nodes + w, w < nodes
    key = tl.load(keys + row[:, None] * pieces * k + c[None, :], real[:, None] & (c < pieces * k)[None, :], _NONE)
    found = tl.full([WP, KP], _NONE, tl.int64)
    for n in range(k):
        best = tl.max(key, 1)[:, None]
        found = tl.where(i[None, :] == n, best, found)
        key = tl.where(key == best, _NONE, key)

    there = real[:, None] & (p < pieces)[None, :]
    high = tl.load(highs + row[:, None] * pieces + p[None, :], there, float("-inf"))
    most = tl.where(real, tl.max(high, 1), 0.0)
    total = tl.where(real, tl.sum(tl.load(sums + row[:, None] * pieces + p[None, :], there, 0.0) * tl.exp(high - most[:, None]), 1), 1.0)
    logs = _value(found) - most[:, None] - tl.log(total)[:, None]
    # where nothing is a number, any token
    number = tl.minimum((found & _LAST) ^ _LAST, width - 1)
    wanted = real[:, None] & (i < k)[None, :]
    token = tl.load(columns + number, wanted, 0) if COLUMNS else number
    m = w[:, None] * k + i[None, :]
    score = logs
    parent = tl.full([WP], -1, tl.int64)
    if not ROOT:
        score += tl.load(reached + row, real, 0.0)[:, None]
        parent = tl.load(numbers + row, real, -1)
    at = b * candidates + base + m
    tl.store(tokens + at, token, wanted)
    tl.store(parents + at, tl.broadcast_to(parent[:, None], [WP, KP]), wanted)
    tl.store(scores + at, score, wanted)
    tl.store(sure + at, tl.exp(logs), wanted)

    if not LAST:
        # each knows how many are before it
        order = tl.reshape(tl.where(wanted, _key(score, m), _NONE), [WP * KP])
        rank = tl.sum((order[None, :] > order[:, None]).to(tl.int32), 1)
        goes_on = tl.reshape(wanted, [WP * KP]) & (rank < k)
        m, to = tl.reshape(m, [WP * KP]), b * k + rank
        tl.store(to_tokens + to, tl.reshape(token, [WP * KP]), goes_on)
        tl.store(to_origin + to, (m // k).to(tl.int64), goes_on)
        tl.store(to_numbers + to, (base + m).to(tl.int64), goes_on)
        tl.store(to_reached + to, tl.reshape(score, [WP * KP]), goes_on)
        a = tl.arange(0, AP)
        sees = ((a[None, :] - seen) == rank[:, None]).to(tl.int8)
        if not ROOT:
            before = tl.load(visible + (b * nodes + m // k)[:, None] * seen + a[None, :], goes_on[:, None] & (a < seen)[None, :], 0)
            sees = tl.where((a < seen)[None, :], before.to(tl.int8), sees)
        tl.store(to_visible + to[:, None] * (seen + k) + a[None, :], sees, goes_on[:, None] & (a < seen + k)[None, :])


@triton.jit
def _choose(tokens, parents, scores, sure, to_tokens, to_parents, to_sure, candidates, count, CP: tl.constexpr, TILE: tl.constexpr):
    b, c = tl.program_id(0), tl.arange(0, CP)
    at, inside = b * candidates + c, c < candidates
    score = tl.load(scores + at, inside, float("-inf"))
    rank = tl.zeros([CP], tl.int32)
    for start in range(0, candidates, TILE):
        j = start + tl.arange(0, TILE)
        other = tl.load(scores + b * candidates + j, j < candidates, float("-inf"))[None, :]
        before = (other > score[:, None]) | ((other == score[:, None]) & (j[None, :] < c[:, None]))
        rank += tl.sum((before & (j < candidates)[None, :]).to(tl.int32), 1)
    chosen = inside & (rank < count)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    chosen = chosen & (place < count)  # more have a rank below it if scores are no numbers
    parent = tl.load(parents + at, inside, -1).to(tl.int32)
    parent = tl.where(parent < 0, -1, tl.gather(place, tl.maximum(parent, 0), 0))
    to = b * count + place
    tl.store(to_tokens + to, tl.load(tokens + at, chosen, 0), chosen)
    tl.store(to_parents + to, parent.to(tl.int64), chosen)
    tl.store(to_sure + to, tl.load(sure + at, chosen, 0.0), chosen)


@triton.jit
def _ancestors(parents, ancestors, depths, ps_b, ps_n, nodes, TP: tl.constexpr):
    node, b = tl.program_id(0), tl.program_id(1)
    a = tl.arange(0, TP)
    seen, depth, above = a == node, tl.full([], 0, tl.int32), node
    while above > 0:
        # no higher than the one before: what is wrong ends, too
        above = tl.minimum(tl.load(parents + b * ps_b + (above - 1) * ps_n).to(tl.int32) + 1, above - 1)
        seen = seen | (a == above)
        depth += 1
    here = b * nodes + node
    tl.store(ancestors + here * nodes + a, seen.to(tl.int8), a < nodes)
    tl.store(depths + here, depth.to(tl.int64))


@triton.jit
def _walk(
    values, numbers, tokens, parents, path, accepted, following, taken, pieces, vocabulary, proposals, depth, ts_b, ts_n, ps_b, ps_n,
    TP: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    # node 0 is the root, its own parent; n + 1 is proposed token n
    b = tl.program_id(0)
    n, piece = tl.arange(0, TP), tl.arange(0, NP)
    at = (b * (proposals + 1) + n)[:, None] * pieces + piece[None, :]
    there = (n <= proposals)[:, None] & (piece < pieces)[None, :]
    value = tl.load(values + at, there, float("-inf"))
    number = tl.load(numbers + at, there, 0)
    # of equals the first; where nothing is a number, any token
    choice = tl.min(tl.where(value == tl.max(value, 1)[:, None], number, vocabulary - 1), 1)
    tokens += b * ts_b - ts_n
    parents += b * ps_b - ps_n
    proposed = (n > 0) & (n <= proposals)
    parent = tl.load(parents + n * ps_n, proposed, -1).to(tl.int32) + 1
    fits = proposed & (tl.load(tokens + n * ts_n, proposed, -1) == tl.gather(choice, parent, 0))
    level = tl.where(n == 0, 0, -1)
    for _ in range(depth):
        above = tl.gather(level, parent, 0)
        level = tl.where(fits & (above >= 0), above + 1, level)
    most = tl.max(level, 0)
    node = tl.min(tl.where(level == most, n, TP), 0)
    tl.store(accepted + b, most.to(tl.int64))
    tl.store(following + b, tl.sum(tl.where(n == node, choice, 0), 0).to(tl.int64))
    for i in range(depth):
        place = depth - 1 - i
        on = place < most
        tl.store(path + b * depth + place, tl.where(on, node - 1, -1).to(tl.int64))
        tl.store(taken + b * depth + place, tl.load(tokens + tl.where(on, node, 1) * ts_n))
        node = tl.where(on, tl.load(parents + node * ps_n, on, -1).to(tl.int32) + 1, node)


@triton.jit
def _keep(table, lengths, path, depth, width, ss_b, ss_h, ss_s, ps_b, ps_d, WORD: tl.constexpr, BLOCK: tl.constexpr):
    b, d = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    at = tl.load(table + tl.program_id(0)).to(tl.pointer_type(WORD)) + b * ss_b + tl.program_id(2).to(tl.int64) * ss_h
    at += (tl.load(lengths + b) + 1) * ss_s + d
    # in place, one after the other: path[i] >= i, since parents come first, and it rises, so that no slot is read after it was written
    for i in range(depth):
        came = tl.load(path + b * ps_b + i * ps_d)
        if came > i:
            tl.store(at + i * ss_s, tl.load(at + came * ss_s, d < width), d < width)


def piece_of(logits: Tensor, k: int) -> int | None:
    """Tokens of a piece, such that the best of all pieces fit into a program; None: too many."""
    rows = triton.next_power_of_2(logits.shape[1])
    piece = min(PIECE, triton.next_power_of_2(logits.shape[2]))
    while piece <= _MOST:
        if rows * triton.next_power_of_2(triton.cdiv(logits.shape[2], piece) * k) <= MOST_KEYS:
            return piece
        piece *= 2
    return None


def expand(logits: Tensor, columns: Tensor | None, front: Front | None, into: Candidates, base: int, k: int, last: bool) -> Front | None:
    """As the reference."""
    (batch, nodes, width), piece = logits.shape, piece_of(logits, k)
    assert piece is not None
    pieces, rows, seen = triton.cdiv(width, piece), batch * nodes, 0 if front is None else front.visible.shape[2]
    keys = logits.new_empty(rows, pieces, k, dtype=torch.int64)
    highs, sums = (logits.new_empty(rows, pieces, dtype=torch.float32) for _ in range(2))
    tokens, origin, numbers = (keys.new_empty(batch, k) for _ in range(3))
    found = Front(tokens, origin, numbers, highs.new_empty(batch, k), keys.new_empty(batch, k, seen + k, dtype=torch.bool))
    of = found if front is None else Front(*(x.contiguous() for x in front))
    wide_w, wide_k, wide_n = (triton.next_power_of_2(n) for n in (nodes, k, pieces * k))
    warps = 16 if wide_w * wide_k > 64 else 8 if wide_w * wide_n > 2048 else 4  # of many children a program compares each with each
    with torch.cuda.device_of(logits):
        _top[(pieces, rows)](logits, keys, highs, sums, width, nodes, k, *logits.stride()[:2], PIECE=piece, num_warps=max(1, piece // 512))
        _level[(batch,)](
            keys, highs, sums, keys if columns is None else columns, of.numbers, of.scores, of.visible.view(torch.uint8), *into, *found[:4],
            found.visible.view(torch.uint8), pieces, width, nodes, k, base, into.tokens.shape[1], seen,
            ROOT=front is None, COLUMNS=columns is not None, LAST=last, WP=wide_w, KP=wide_k, PP=triton.next_power_of_2(pieces),
            NP=wide_n, AP=triton.next_power_of_2(seen + k), num_warps=warps,
        )  # fmt: skip
    return None if last else found


def choose_tree(candidates: Candidates, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    batch, size = candidates.tokens.shape
    tokens, parents = (candidates.tokens.new_empty(batch, count) for _ in range(2))
    sure, block = candidates.sure.new_empty(batch, count), triton.next_power_of_2(size)
    with torch.cuda.device_of(tokens):
        _choose[(batch,)](*candidates, tokens, parents, sure, size, count, CP=block, TILE=min(32, block), num_warps=min(16, max(1, block // 32)))
    return tokens, parents, sure


def ancestors_of(parents: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    batch, nodes = parents.shape[0], parents.shape[1] + 1
    seen, depths = parents.new_empty(batch, nodes, nodes, dtype=torch.bool), parents.new_empty(batch, nodes)
    with torch.cuda.device_of(parents):
        _ancestors[(nodes, batch)](parents, seen.view(torch.uint8), depths, *parents.stride(), nodes, TP=triton.next_power_of_2(nodes), num_warps=1)
    return seen, depths


def accept_tree(logits: Tensor, tokens: Tensor, parents: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    batch, places, vocabulary = logits.shape
    pieces = triton.cdiv(vocabulary, PIECE)
    wide_t, wide_p = triton.next_power_of_2(places), triton.next_power_of_2(pieces)
    values = logits.new_empty(batch * places, pieces, dtype=torch.float32)
    numbers = torch.empty_like(values, dtype=torch.int32)
    accepted, following = (tokens.new_empty(batch) for _ in range(2))
    path, taken = (tokens.new_empty(batch, depth) for _ in range(2))
    with torch.cuda.device_of(logits):
        best_of_piece[(pieces, batch * places)](logits, values, numbers, vocabulary, *logits.stride()[:2], places, PIECE=PIECE, num_warps=8)
        _walk[(batch,)](
            values, numbers, tokens, parents, path, accepted, following, taken, pieces, vocabulary, places - 1, depth, *tokens.stride(), *parents.stride(),
            TP=wide_t, NP=wide_p, num_warps=min(8, max(1, wide_t * wide_p // 512)),
        )  # fmt: skip
    return path, accepted, following, taken


def keep_path(stored: Stored, lengths: Tensor, path: Tensor) -> None:
    """As the reference."""
    first = stored.tensors[0]
    batch, heads, _, width = first.shape
    with torch.cuda.device_of(path):
        _keep[(len(stored.tensors), batch, heads)](
            stored.table, lengths, path, path.shape[1], width, *first.stride()[:3], *path.stride(), WORD=_WORDS[first.element_size()],
            BLOCK=triton.next_power_of_2(width), num_warps=1 if width <= 128 else 4,
        )  # fmt: skip
