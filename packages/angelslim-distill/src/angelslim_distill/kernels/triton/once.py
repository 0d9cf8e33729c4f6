"""Losses and gradients towards a whole distribution, of which memory is read once: what a row's second pass reads, a cache still holds.

A row is cut into slices. Of each slice there are two tasks: its sums, and its gradient. Programs take tasks in one order: sums of row 0, 1, 2..., and
a few rows behind them gradients of row 0, 1, 2... So few rows lie between both passes of one, unlike where each program has a row of its own, that
they fit into the L2 cache. Who adds the last slice's sums to a row finds what its gradients need, and its losses.

A gradient waits for its row's sums, which are tasks taken before. Programs hold tasks in rising order, so that of all that are not done the first is
at work and waits for nothing: however many programs run at a time, even one, none waits forever.

With p, q the student's and the teacher's probabilities, a = sum p (log p - log q) and b = sum q (log q - log p): kl is b, rkl a, and cakld
c a + (1 - c) b. Both follow from sums of exp(x - highest) times differences of logits, so that no pass between is needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kinds import Loss
from ...losses import labels_missing
from ..gradient import Losses, Task
from .whole import NOTHING, kind_of, logits, pointer

# tokens of a slice, warps of a program, programs a multiprocessor, tasks between both of a slice for each program
TUNING: tuple[int, int, int, float] = (4096, 4, 4, 1.5)
KINDS = ("kl", "rkl", "cakld")
# below these a launch is too short, or a row has too few slices, for it to be worth while
LEAST_ROWS, LEAST_VOCABULARY = 64, 16_384
SUMS = 8  # numbers of a slice, and of a row


@triton.jit
def _difference(a, b):
    # both may be -inf; NaN comes through the exponentials
    return tl.maximum(a, NOTHING) - tl.maximum(b, NOTHING)


@triton.jit
def _higher(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _added(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _sums_of(y, u, into, step, cold, temperature, KIND: tl.constexpr, TEMPERED: tl.constexpr, LABELS: tl.constexpr):
    # of a slice: highest of both sides, sums of exponentials, of these times differences, and of exponentials at temperature 1
    s, v = (y * cold, u * cold) if TEMPERED else (y, u)
    s_most, t_most = tl.reduce((s, v), 0, _higher)  # numbers together, for which warps wait but once
    s_most, t_most = tl.maximum(s_most, NOTHING), tl.maximum(t_most, NOTHING)
    p, q, d = tl.exp(s - s_most), tl.exp(v - t_most), _difference(s, v)
    s_sum, t_sum, more = tl.reduce((p, q, d * (q if KIND == "kl" else p)), 0, _added)
    tl.store(into, s_most)
    tl.store(into + step, t_most)
    tl.store(into + 2 * step, s_sum)
    tl.store(into + 3 * step, t_sum)
    tl.store(into + 4 * step, more)
    if KIND == "cakld":
        tl.store(into + 5 * step, tl.sum(q * d, 0))
    if TEMPERED and LABELS:
        tl.store(into + 6 * step, tl.sum(tl.exp(y - s_most * temperature), 0))
        if KIND == "cakld":
            tl.store(into + 7 * step, tl.sum(tl.exp(u - t_most * temperature), 0))


@triton.jit
def _total(found, k, has, most, highest):
    # of all slices, in their order
    return tl.sum(tl.load(found + k, has, 0.0, cache_modifier=".cg") * tl.exp(most - highest), 0)


@triton.jit
def _finish(
    x, t, x_bias, t_bias, label, found, sums, kd, ce, vocabulary, splits, x_scale, x_cap, t_scale, t_cap, temperature,
    KIND: tl.constexpr, TEMPERED: tl.constexpr, LABELS: tl.constexpr, X_BIAS: tl.constexpr, X_CAP: tl.constexpr, T_BIAS: tl.constexpr, T_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, SPLITS)
    has = k < splits
    s_most, t_most = tl.load(found + k, has, NOTHING, cache_modifier=".cg"), tl.load(found + splits + k, has, NOTHING, cache_modifier=".cg")
    s_high, t_high = tl.max(s_most, 0), tl.max(t_most, 0)
    s_sum, t_sum = _total(found + 2 * splits, k, has, s_most, s_high), _total(found + 3 * splits, k, has, t_most, t_high)
    s_lse, t_lse = s_high + tl.log(s_sum), t_high + tl.log(t_sum)
    s_lse_1, confidence, a, b = s_lse, 0.0, 0.0, 0.0
    if KIND == "kl":
        b = s_lse - t_lse - _total(found + 4 * splits, k, has, t_most, t_high) / t_sum
    else:
        a = t_lse - s_lse + _total(found + 4 * splits, k, has, s_most, s_high) / s_sum
    if KIND == "cakld":
        b = s_lse - t_lse - _total(found + 5 * splits, k, has, t_most, t_high) / t_sum
    if LABELS:
        named = (label >= 0) & (label < vocabulary)  # of one that is no token the cross entropy is infinite
        if TEMPERED:
            s_lse_1 = s_high * temperature + tl.log(_total(found + 6 * splits, k, has, s_most * temperature, s_high * temperature))
        tl.store(ce, s_lse_1 - logits(x, x_bias, label, named, x_scale, x_cap, X_BIAS, X_CAP))
        if KIND == "cakld":
            t_lse_1 = t_lse
            if TEMPERED:
                t_lse_1 = t_high * temperature + tl.log(_total(found + 7 * splits, k, has, t_most * temperature, t_high * temperature))
            confidence = tl.exp(logits(t, t_bias, label, named, t_scale, t_cap, T_BIAS, T_CAP) - t_lse_1)
    if KIND == "kl":
        loss = b
    elif KIND == "rkl":
        loss = a
    else:
        loss = confidence * a + (1 - confidence) * b
    tl.store(kd, loss * temperature * temperature)
    tl.store(sums, s_lse)
    tl.store(sums + 1, t_lse)
    tl.store(sums + 2, s_lse_1)
    tl.store(sums + 3, a)
    tl.store(sums + 4, confidence)


@triton.jit
def _row_once(
    x, t, g, x_bias, t_bias, labels, kd, ce, taken, ready, slices, sums, rows, vocabulary, splits, behind, x_stride, t_stride, g_stride,
    x_scale, x_cap, t_scale, t_cap, temperature, kd_weight, ce_weight,
    KIND: tl.constexpr, TEMPERED: tl.constexpr, LABELS: tl.constexpr, X_BIAS: tl.constexpr, X_CAP: tl.constexpr, X_SCALED: tl.constexpr,
    T_BIAS: tl.constexpr, T_CAP: tl.constexpr, T_SCALED: tl.constexpr, SUMS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cold, end = 1 / temperature, 2 * splits * (rows + behind)
    task = tl.atomic_add(taken, 1, sem="relaxed")
    while task < end:
        row, split = task // (2 * splits), task % (2 * splits)
        second = split >= splits
        row, split = (row - tl.where(second, behind, 0)).to(tl.int64), tl.where(second, split - splits, split)
        own_x, own_t, own_g = x + row * x_stride, t + row * t_stride, g + row * g_stride
        j = split * BLOCK + tl.arange(0, BLOCK)
        # the next task is taken while logits are on their way
        if (row < 0) | (row >= rows):
            task = tl.atomic_add(taken, 1, sem="relaxed")
        elif second:
            has = j < vocabulary
            y = logits(own_x, x_bias, j, has, x_scale, x_cap, X_BIAS, X_CAP, X_SCALED, "evict_first")
            u = logits(own_t, t_bias, j, has, t_scale, t_cap, T_BIAS, T_CAP, T_SCALED, "evict_first")
            task = tl.atomic_add(taken, 1, sem="relaxed")
            there = tl.atomic_add(ready + row, 0, sem="acquire", scope="gpu")
            while there <= splits:
                there = tl.atomic_add(ready + row, 0, sem="acquire", scope="gpu")
            own = sums + row * SUMS
            s_lse, t_lse = tl.load(own, cache_modifier=".cg"), tl.load(own + 1, cache_modifier=".cg")
            s, v = (y * cold - s_lse, u * cold - t_lse) if TEMPERED else (y - s_lse, u - t_lse)
            p, q = tl.exp(s), tl.exp(v)
            if KIND == "kl":
                asked = kd_weight * (p - q)
            else:
                pushed = p * (_difference(s, v) - tl.load(own + 3, cache_modifier=".cg"))
                if KIND == "cakld":
                    confidence = tl.load(own + 4, cache_modifier=".cg")
                    pushed = confidence * pushed + (1 - confidence) * (p - q)
                asked = kd_weight * pushed
            if LABELS:
                p_1 = tl.exp(y - tl.load(own + 2, cache_modifier=".cg")) if TEMPERED else p
                asked += ce_weight * tl.where(j == tl.load(labels + row).to(tl.int32), p_1 - 1, p_1)
            if X_CAP:
                asked *= 1 - (y / x_cap) * (y / x_cap)
            # four beside each other, or lanes would read eight, in two goes of half of each sector
            to = tl.max_contiguous(split * BLOCK + tl.arange(0, BLOCK), 4)
            tl.store(own_g + to, asked.to(g.dtype.element_ty), has, eviction_policy="evict_first")
        else:
            has = j < vocabulary
            y = logits(own_x, x_bias, j, has, x_scale, x_cap, X_BIAS, X_CAP, X_SCALED)
            u = logits(own_t, t_bias, j, has, t_scale, t_cap, T_BIAS, T_CAP, T_SCALED)
            task = tl.atomic_add(taken, 1, sem="relaxed")
            found = slices + row * SUMS * splits
            _sums_of(y, u, found + split, splits, cold, temperature, KIND, TEMPERED, LABELS)
            if tl.atomic_add(ready + row, 1, sem="acq_rel", scope="gpu") == splits - 1:
                label = tl.load(labels + row).to(tl.int32) if LABELS else 0
                _finish(
                    own_x, own_t, x_bias, t_bias, label, found, sums + row * SUMS, kd + row, ce + row, vocabulary, splits,
                    x_scale, x_cap, t_scale, t_cap, temperature, KIND, TEMPERED, LABELS, X_BIAS, X_CAP, T_BIAS, T_CAP, SPLITS,
                )  # fmt: skip
                tl.atomic_add(ready + row, 1, sem="release", scope="gpu")


def supports(rows: int, vocabulary: int, loss: Loss, gradient: bool) -> tuple[bool, str]:
    """Whether two passes are enough for a loss and rows are many and long enough."""
    fits = gradient and kind_of(loss) in KINDS and rows >= LEAST_ROWS and vocabulary >= LEAST_VOCABULARY
    return fits, f"gradients of {', '.join(KINDS)}, {LEAST_ROWS} rows and {LEAST_VOCABULARY} tokens"


def programs(x: Tensor) -> int:
    """How many run; one after the other where there is no GPU."""
    return TUNING[2] * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def towards_whole_once(x: Tensor, teacher: Tensor, labels: Tensor | None, task: Task, into: Tensor) -> Losses:
    """As the reference."""
    rows, vocabulary = x.shape
    loss, student, towards = task.loss, task.student, task.teacher
    if loss.rule.confidence and labels is None:
        raise labels_missing()
    block, warps, _, ahead = TUNING
    splits, count = triton.cdiv(vocabulary, block), programs(x)
    behind = max(1, round(ahead * count / (2 * splits)))
    state = torch.zeros(32 + 2 * rows, dtype=torch.int32, device=x.device)  # tasks taken, slices there, and cross entropies, 0 without labels
    ready, ce = state[32:][:rows], state[32 + rows :].view(torch.float32)
    kd, sums = torch.empty(rows, device=x.device), torch.empty(rows, SUMS, device=x.device)
    slices = torch.empty(rows, SUMS, splits, device=x.device)
    with torch.cuda.device_of(x):
        _row_once[(count,)](
            x, teacher, into, pointer(student, x), pointer(towards, x), x if labels is None else labels, kd, ce, state, ready, slices, sums,
            rows, vocabulary, splits, behind, x.stride(0), teacher.stride(0), into.stride(0),
            float(student.scale), float(student.softcap or 0), float(towards.scale), float(towards.softcap or 0), float(loss.temperature),
            float(task.kd_weight * loss.temperature * student.scale), float(task.ce_weight * student.scale),
            KIND=kind_of(loss), TEMPERED=loss.temperature != 1, LABELS=labels is not None,
            X_BIAS=student.bias is not None, X_CAP=student.softcap is not None, X_SCALED=student.scale != 1,
            T_BIAS=towards.bias is not None, T_CAP=towards.softcap is not None, T_SCALED=towards.scale != 1,
            SUMS=SUMS, SPLITS=triton.next_power_of_2(splits), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return Losses(kd, ce)
