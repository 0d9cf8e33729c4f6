"""Losses and gradients towards a whole distribution, of which memory is read once: registers hold a row's exponentials until its sums are there.

A row is cut into slices, and a group of programs that run at the same time takes one slice each. A program reads its slice, tells the others its sums,
waits for theirs and writes gradients. Groups take rows in turn, and while some wait, others read: what counts is how much all registers hold at a time,
for which few warps with many tokens each are best.

Programs take places in the order in which they start, a group's places one after the other. So those that wait wait for programs that have
started or are next to start. n launches at the same time come to an end where the GPU holds more than n (slices - 1) programs; `supports` asks for
eight rows' slices.

With p, q the student's and the teacher's probabilities, s, t their logits over the temperature and d = s - t, kl is the difference of the logarithms of
both sums less the mean of d by q, and rkl the mean by p less that difference. They ask p - q of a logit, and p (d - mean of d by p). Logits, sums and
losses inside are to the base 2, whose powers the GPU has.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gradient import Losses, Task
from .whole import NOTHING, kind_of, logits, pointer

# tokens of a slice, warps of a program, registers of a thread: those of two logits for each of its tokens, and some 40
TUNING: tuple[int, int, int] = (4096, 2, 168)
KINDS = ("kl", "rkl")
FEWEST, SHORTEST = 1 << 24, 8  # logits of either side that a cache still holds, and slices of a row below which the other kernel is faster
LOWEST = tl.constexpr(-1e9)  # a slice of which nothing is above, as an exponent of 2, has no part in its row
NONE = tl.constexpr(float("-inf"))  # so that a row without any logit is no number
LN_2 = tl.constexpr(math.log(2))
NUMBERS = tl.constexpr(3)  # that a slice tells


@triton.jit
def _product(x, bias, j, vocabulary, BIAS: tl.constexpr):
    # of a slice, before it is scaled. What is excluded is finite, so that differences are numbers; what is not a number stays so
    y = tl.load(x + j, j < vocabulary, NOTHING).to(tl.float32)
    if BIAS:
        y += tl.load(bias + j, j < vocabulary, 0.0).to(tl.float32)
    return tl.maximum(y, NOTHING, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _power(x, PTX: tl.constexpr):
    # of 2. Results below the least normal number are 0: to keep them takes three more instructions, where a token has sixteen
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.exp2(x)


@triton.jit
def _higher(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _added(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _tell(to, x):
    # as bits of which none are 0, which says that a number is not there yet: who reads it needs no other sign, and no order. Zero goes as -0
    bits = x.to(tl.int32, bitcast=True)
    tl.atomic_xchg(to, tl.where(bits == 0, -2147483648, bits), sem="relaxed", scope="gpu")


@triton.jit
def _hear(told, splits, k, has):
    return tl.load(told + k, has, 1, volatile=True), tl.load(told + splits + k, has, 1, volatile=True), tl.load(told + 2 * splits + k, has, 1, volatile=True)


@triton.jit
def _missing(a, b, c):
    # how many slices have told too little
    return tl.sum(((a == 0) | (b == 0) | (c == 0)).to(tl.int32), 0)


@triton.jit(do_not_specialize=["rows", "splits", "groups"])
def _row_held(
    x, t, g, x_bias, t_bias, labels, kd, ce, taken, told, rows, vocabulary, splits, groups, x_stride, t_stride, g_stride, x_unit, t_unit, ratio, x_scale,
    kd_scale, kd_weight, ce_weight,
    KIND: tl.constexpr, LABELS: tl.constexpr, X_BIAS: tl.constexpr, T_BIAS: tl.constexpr, TELLS: tl.constexpr, HEARS: tl.constexpr,
    PTX: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.atomic_add(taken, 1, sem="relaxed")
    row, part = (place // splits).to(tl.int64), place % splits
    j, k = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SPLITS)
    others = k < splits
    while row < rows:
        own = told + row * NUMBERS * splits
        y, u = _product(x + row * x_stride, x_bias, j, vocabulary, X_BIAS), _product(t + row * t_stride, t_bias, j, vocabulary, T_BIAS)
        s_most, t_most = tl.reduce((y, u), 0, _higher)  # numbers together, for which warps wait but once
        # far lower, what a product is rounded by would be a large power below
        s_most, t_most = tl.maximum(s_most * x_unit, LOWEST), tl.maximum(t_most * t_unit, LOWEST)
        p, q, d = _power(y * x_unit - s_most, PTX), _power(u * t_unit - t_most, PTX), y - u * ratio  # d in units of y
        if TELLS:
            s_sum, t_sum, more = tl.reduce((p, q, d * (q if KIND == "kl" else p)), 0, _added)
            _tell(own + part, s_most + tl.log2(s_sum))
            _tell(own + splits + part, t_most + tl.log2(t_sum))
            by = t_sum if KIND == "kl" else s_sum
            _tell(own + 2 * splits + part, more * x_unit / tl.where(by == 0, 1, by))
        if HEARS:
            n0, n1, n2 = _hear(own, splits, k, others)
            while _missing(n0, n1, n2) > 0:
                n0, n1, n2 = _hear(own, splits, k, others)
            s_logs, t_logs = tl.where(others, n0.to(tl.float32, bitcast=True), NONE), tl.where(others, n1.to(tl.float32, bitcast=True), NONE)
            s_high, t_high = tl.reduce((s_logs, t_logs), 0, _higher)
            s_by, t_by = _power(s_logs - s_high, PTX), _power(t_logs - t_high, PTX)
            s_sum, t_sum, mean = tl.reduce((s_by, t_by, n2.to(tl.float32, bitcast=True) * (t_by if KIND == "kl" else s_by)), 0, _added)
            s_log, t_log = s_high + tl.log2(s_sum), t_high + tl.log2(t_sum)
            student, apart = _power(s_most - s_log, PTX), s_log - t_log
            if KIND == "kl":
                loss = apart - mean / t_sum
                asked = p * (student * (kd_weight + ce_weight)) - q * (_power(t_most - t_log, PTX) * kd_weight)
            else:
                loss = mean / s_sum - apart
                asked = p * student * ((d * x_unit - apart - loss) * (kd_weight * LN_2) + ce_weight)
            if LABELS:
                label = tl.load(labels + row).to(tl.int32)
                asked -= tl.where(j == label, ce_weight, 0.0)
                if part == 0:
                    named = (label >= 0) & (label < vocabulary)  # of one that is no token the cross entropy is infinite
                    tl.store(ce + row, s_log * LN_2 - logits(x + row * x_stride, x_bias, label, named, x_scale, 1.0, X_BIAS, False))
            if part == 0:
                tl.store(kd + row, loss * kd_scale)
                if not LABELS:
                    tl.store(ce + row, 0.0)
            # four beside each other, or lanes would read eight, in two goes of half of each sector
            to = tl.max_contiguous(j, 4)
            tl.store(g + row * g_stride + to, asked.to(g.dtype.element_ty), to < vocabulary)
        row += groups


def supports(x: Tensor, task: Task, labels: bool, gradient: bool) -> tuple[bool, str]:
    """Whether what a row asks follows from exponentials and their sums, logits are many enough, and groups of programs fit onto the GPU."""
    rows, vocabulary = x.shape
    plain = all(finish.softcap is None and finish.scale > 0 for finish in (task.student, task.teacher)) and not (labels and task.loss.temperature != 1)
    splits = triton.cdiv(vocabulary, TUNING[0])
    many = rows * vocabulary >= FEWEST and splits >= SHORTEST and 8 * splits <= programs(x)
    return gradient and plain and kind_of(task.loss) in KINDS and many and torch.version.hip is None, (
        f"gradients of {' and '.join(KINDS)} without softcaps, labels only at temperature 1, {FEWEST} logits and {SHORTEST} slices of {TUNING[0]} or more, "
        "and an NVIDIA GPU that holds eight rows"
    )


def together(x: Tensor) -> bool:
    """Whether programs run at the same time: the interpreter runs one after the other."""
    return x.is_cuda and not triton.knobs.runtime.interpret


def programs(x: Tensor) -> int:
    """How many the GPU holds; in the interpreter there is no limit."""
    if not together(x):
        return 1 << 30
    device, (_, warps, registers) = torch.cuda.get_device_properties(x.device), TUNING
    held = device.regs_per_multiprocessor  # type: ignore[attr-defined]  # torch's stubs lack it
    return device.multi_processor_count * (held // (32 * warps * registers))


def towards_whole_held(x: Tensor, teacher: Tensor, labels: Tensor | None, task: Task, into: Tensor) -> Losses:
    """As the reference."""
    rows, vocabulary = x.shape
    loss, student, towards = task.loss, task.student, task.teacher
    block, warps, registers = TUNING
    splits = triton.cdiv(vocabulary, block)
    groups = min(rows, programs(x) // splits)
    # made in one launch: places taken, one number a phase in a line of its own, and what slices tell
    state = torch.zeros(32 + rows * NUMBERS.value * splits, dtype=torch.int32, device=x.device)
    taken, told = state[:32], state[32:]
    kd, ce = torch.empty(rows, device=x.device), torch.empty(rows, device=x.device)
    unit, at_once = math.log2(math.e) / loss.temperature, together(x)
    options = {"BLOCK": block, "num_warps": warps, **({"maxnreg": registers} if at_once else {})}
    with torch.cuda.device_of(x):
        # programs that run one after the other cannot wait for each other: they tell first, and then hear
        for phase, (tells, hears) in enumerate([(True, True)] if at_once else [(True, False), (False, True)]):
            _row_held[(groups * splits,)](
                x, teacher, into, pointer(student, x), pointer(towards, x), x if labels is None else labels, kd, ce, taken[phase:], told,
                rows, vocabulary, splits, groups, x.stride(0), teacher.stride(0), into.stride(0), float(student.scale * unit), float(towards.scale * unit),
                float(towards.scale / student.scale), float(student.scale), float(loss.temperature**2 * math.log(2)),
                float(task.kd_weight * loss.temperature * student.scale), float(task.ce_weight * student.scale if labels is not None else 0),
                KIND=kind_of(loss), LABELS=labels is not None, X_BIAS=student.bias is not None, T_BIAS=towards.bias is not None, TELLS=tells, HEARS=hears,
                PTX=at_once, SPLITS=triton.next_power_of_2(splits), **options,
            )  # fmt: skip
    return Losses(kd, ce)
