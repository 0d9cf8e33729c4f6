"""Losses and gradients towards a whole distribution, of which memory is read once: what a row's second pass reads, a cache still holds.

A row is cut into slices. Of each slice there are two tasks: its sums, and its gradient. Programs take tasks in one order: sums of a row, the gradient
of the row a few before, sums of the next row... So few rows lie between both passes of one, unlike where each program has a row of its own, that they
fit into the L2 cache. Who adds the last slice's sums to a row finds what its gradients need, and its losses. Each number is found in one order,
whichever program finds it.

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
LEAST = 1 << 23  # logits of either side below which all of them fit into a cache anyway
SUMS = 8  # numbers of a slice, and of a row


@triton.jit
def _exp(x, PTX: tl.constexpr):
    # results below the least normal number are 0: to keep them takes three more instructions, where there are six beside
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], tl.float32, True, 1)
    return tl.exp(x)


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
def _sums_of(y, u, into, step, cold, temperature, KIND: tl.constexpr, TEMPERED: tl.constexpr, LABELS: tl.constexpr, PTX: tl.constexpr):
    # of a slice: highest of both sides, sums of exponentials, of these times differences, and of exponentials at temperature 1
    s, v = (y * cold, u * cold) if TEMPERED else (y, u)
    s_most, t_most = tl.reduce((s, v), 0, _higher)  # numbers together, for which warps wait but once
    s_most, t_most = tl.maximum(s_most, NOTHING), tl.maximum(t_most, NOTHING)
    p, q, d = _exp(s - s_most, PTX), _exp(v - t_most, PTX), _difference(s, v)
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
def _publish(to, x):
    # as bits of which none are 0, which says that a number is not there yet: who reads it needs no other sign. Zero goes as -0
    bits = x.to(tl.int32, bitcast=True)
    tl.atomic_xchg(to, tl.where(bits == 0, -2147483648, bits), sem="relaxed", scope="gpu")


@triton.jit
def _peek(sums):
    return (
        tl.load(sums, volatile=True), tl.load(sums + 1, volatile=True), tl.load(sums + 2, volatile=True),
        tl.load(sums + 3, volatile=True), tl.load(sums + 4, volatile=True),
    )  # fmt: skip


@triton.jit
def _place(task, rows, splits, behind):
    # of a task: whether it is of the second pass, its row and slice; rows before the first and beyond the last have nothing to do
    row, split = task // (2 * splits), task % (2 * splits)
    second = split >= splits
    row = row - tl.where(second, behind, 0)
    return second, (row >= 0) & (row < rows), row.to(tl.int64), split - tl.where(second, splits, 0)


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
    zero = tl.full([], 0.0, tl.float32)
    s_lse_1, confidence, a, b = s_lse, zero, zero, zero
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
    _publish(sums, s_lse)
    _publish(sums + 1, t_lse)
    _publish(sums + 2, s_lse_1)
    _publish(sums + 3, a)
    _publish(sums + 4, confidence)


@triton.jit(do_not_specialize=["rows", "splits", "behind"])
def _row_once(
    x, t, g, x_bias, t_bias, labels, kd, ce, taken, ready, slices, sums, rows, vocabulary, splits, behind, x_stride, t_stride, g_stride,
    x_scale, x_cap, t_scale, t_cap, temperature, kd_weight, ce_weight,
    KIND: tl.constexpr, TEMPERED: tl.constexpr, LABELS: tl.constexpr, X_BIAS: tl.constexpr, X_CAP: tl.constexpr, X_SCALED: tl.constexpr,
    T_BIAS: tl.constexpr, T_CAP: tl.constexpr, T_SCALED: tl.constexpr, SUMS: tl.constexpr, SPLITS: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cold, end, lanes = 1 / temperature, 2 * splits * (rows + behind), tl.arange(0, BLOCK)
    task = tl.atomic_add(taken, 1, sem="relaxed")
    second, real, row, split = _place(task, rows, splits, behind)
    j = split * BLOCK + lanes
    y = logits(x + row * x_stride, x_bias, j, j < tl.where(real, vocabulary, 0), x_scale, x_cap, X_BIAS, X_CAP, X_SCALED)
    u = logits(t + row * t_stride, t_bias, j, j < tl.where(real, vocabulary, 0), t_scale, t_cap, T_BIAS, T_CAP, T_SCALED)
    after = tl.atomic_add(taken, 1, sem="relaxed")
    while task < end:
        own, found = sums + row * SUMS, slices + row * SUMS * splits
        if real and second:
            n0, n1, n2, n3, n4 = _peek(own)
            while (n0 == 0) | (n1 == 0) | (n2 == 0) | (n3 == 0) | (n4 == 0):
                n0, n1, n2, n3, n4 = _peek(own)
            s_lse, t_lse = n0.to(tl.float32, bitcast=True), n1.to(tl.float32, bitcast=True)
            s, v = (y * cold - s_lse, u * cold - t_lse) if TEMPERED else (y - s_lse, u - t_lse)
            p, q = _exp(s, PTX), _exp(v, PTX)
            if KIND == "kl":
                asked = kd_weight * (p - q)
            else:
                pushed = p * (_difference(s, v) - n3.to(tl.float32, bitcast=True))
                if KIND == "cakld":
                    confidence = n4.to(tl.float32, bitcast=True)
                    pushed = confidence * pushed + (1 - confidence) * (p - q)
                asked = kd_weight * pushed
            if LABELS:
                p_1 = tl.exp(y - n2.to(tl.float32, bitcast=True)) if TEMPERED else p
                asked += ce_weight * tl.where(split * BLOCK + lanes == tl.load(labels + row).to(tl.int32), p_1 - 1, p_1)
            if X_CAP:
                asked *= 1 - (y / x_cap) * (y / x_cap)
            # four beside each other, or lanes would read eight, in two goes of half of each sector
            to = tl.max_contiguous(split * BLOCK + lanes, 4)
            tl.store(g + row * g_stride + to, asked.to(g.dtype.element_ty), to < vocabulary, eviction_policy="evict_first")
        elif real:
            _sums_of(y, u, found + split, splits, cold, temperature, KIND, TEMPERED, LABELS, PTX)
        # the next logits are on their way while the sums of these are told, and a task is taken
        summed, last = real & (second == 0), row
        task = after
        second, real, row, split = _place(task, rows, splits, behind)
        j = split * BLOCK + lanes
        y = logits(x + row * x_stride, x_bias, j, j < tl.where(real, vocabulary, 0), x_scale, x_cap, X_BIAS, X_CAP, X_SCALED)
        u = logits(t + row * t_stride, t_bias, j, j < tl.where(real, vocabulary, 0), t_scale, t_cap, T_BIAS, T_CAP, T_SCALED)
        there = -1
        if summed:
            there = tl.atomic_add(ready + last, 1, sem="acq_rel", scope="gpu")
        if there == splits - 1:
            label = tl.load(labels + last).to(tl.int32) if LABELS else 0
            _finish(
                x + last * x_stride, t + last * t_stride, x_bias, t_bias, label, found, own, kd + last, ce + last, vocabulary, splits,
                x_scale, x_cap, t_scale, t_cap, temperature, KIND, TEMPERED, LABELS, X_BIAS, X_CAP, T_BIAS, T_CAP, SPLITS,
            )  # fmt: skip
        after = tl.atomic_add(taken, 1, sem="relaxed")


def supports(rows: int, vocabulary: int, loss: Loss, gradient: bool) -> tuple[bool, str]:
    """Whether two passes are enough for a loss and logits are many enough."""
    return gradient and kind_of(loss) in KINDS and rows * vocabulary >= LEAST, f"gradients of {', '.join(KINDS)}, and at least {LEAST} logits"


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
    # in one piece, made in one launch: tasks taken, slices there, numbers of rows, and cross entropies, 0 without labels
    state = torch.zeros(32 + rows * (2 + SUMS), dtype=torch.int32, device=x.device)
    ready, sums, ce = state[32:].split((rows, rows * SUMS, rows))
    kd, ce = torch.empty(rows, device=x.device), ce.view(torch.float32)
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
            SUMS=SUMS, SPLITS=triton.next_power_of_2(splits), PTX=x.is_cuda and torch.version.hip is None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return Losses(kd, ce)
