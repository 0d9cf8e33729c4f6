"""Losses and gradients towards a whole distribution, a program a row: logits are read two or three times, gradients written once.

Each pass goes through a row the other way round than the one before, since what was read last is what a cache still holds: the rows that are worked on
at one time, 1.2 MB each for 150 thousand tokens, are far more than it could hold.

The first pass finds the logarithms of both sums of exponentials. The gradient of kl follows from them; that of the others also needs a sum
over the row, which a second pass finds. The last pass writes.

With p, q the student's and the teacher's probabilities at the temperature T, a loss that is a sum of f(p_v, q_v) asks
p_v (f'_v - sum_w p_w f'_w) of the logit v / T, f' being the derivative by p.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kinds import Loss
from ...losses import labels_missing
from ..gradient import Finish, Losses, Task

NOTHING = tl.constexpr(-1e30)


@triton.jit
def logits(x, bias, j, has, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    # of a tile; -inf beyond the vocabulary
    y = tl.load(x + j, has, 0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + j, has, 0.0).to(tl.float32)
    y *= scale
    if CAP:
        y = cap * (1 - 2 / (tl.exp(2 * (y / cap)) + 1))
    return tl.where(has, y, float("-inf"))


@triton.jit
def more(most, total, x):
    # highest so far and sum of exp(x - highest), of each lane for itself: one exponential each, and no lane waits for another
    d = x - most
    e = tl.exp(-tl.abs(d))
    return tl.where(d > 0, x, most), tl.where(d > 0, total * e + 1, total + e)


@triton.jit
def log_sum(most, total):
    highest = tl.max(most, 0)
    return highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))


@triton.jit
def _log(x, lse):
    # not by a maximum, which would hide NaN
    x = x - lse
    return tl.where(x < NOTHING, NOTHING, x)


@triton.jit
def _terms(s, t, confidence, beta, KIND: tl.constexpr):
    # of log-probabilities (of logits for mse): the loss's terms and their derivatives by the student's probabilities, but for a constant
    slope = tl.zeros_like(s)
    d = s - t
    if KIND == "kl":
        value = -tl.exp(t) * d
    elif KIND == "rkl":
        value, slope = tl.exp(s) * d, d
    elif KIND == "cakld":
        value, slope = (confidence * tl.exp(s) - (1 - confidence) * tl.exp(t)) * d, confidence * d
    elif KIND == "jsd":
        low, high = s + tl.log(1 - beta), t + tl.log(beta)
        mixed = tl.maximum(low, high) + tl.log(1 + tl.exp(-tl.abs(low - high)))
        slope = (1 - beta) * (s - mixed)
        value = beta * tl.exp(t) * (t - mixed) + tl.exp(s) * slope
    elif KIND == "tvd":
        d = tl.exp(s) - tl.exp(t)
        value, slope = 0.5 * tl.abs(d), tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, d))
    else:
        value = d * d
    return value, slope


@triton.jit
def _row(
    x, t, g, x_bias, t_bias, labels, kd, ce, vocabulary, x_stride, t_stride, g_stride, x_scale, x_cap, t_scale, t_cap,
    temperature, beta, kd_weight, ce_weight,
    KIND: tl.constexpr, TEMPERED: tl.constexpr, LABELS: tl.constexpr, GRADIENT: tl.constexpr,
    X_BIAS: tl.constexpr, X_CAP: tl.constexpr, T_BIAS: tl.constexpr, T_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x, t, g = x + row * x_stride, t + row * t_stride, g + row * g_stride
    lanes, cold = tl.arange(0, BLOCK), 1 / temperature
    nothing, zeros = tl.full([BLOCK], NOTHING, tl.float32), tl.zeros([BLOCK], tl.float32)
    NORMALIZED: tl.constexpr = KIND != "mse"
    APART: tl.constexpr = LABELS and (TEMPERED or not NORMALIZED)  # whether cross entropy needs a sum of its own
    s_most, s_sum, t_most, t_sum = nothing, zeros, nothing, zeros
    s_most_1, s_sum_1, t_most_1, t_sum_1 = nothing, zeros, nothing, zeros
    if NORMALIZED or LABELS:
        for start in range(0, vocabulary, BLOCK):
            j = start + lanes
            has = j < vocabulary
            s = logits(x, x_bias, j, has, x_scale, x_cap, X_BIAS, X_CAP)
            if NORMALIZED:
                u = logits(t, t_bias, j, has, t_scale, t_cap, T_BIAS, T_CAP)
                s_most, s_sum = more(s_most, s_sum, s * cold)
                t_most, t_sum = more(t_most, t_sum, u * cold)
                if KIND == "cakld" and TEMPERED:
                    t_most_1, t_sum_1 = more(t_most_1, t_sum_1, u)
            if APART:
                s_most_1, s_sum_1 = more(s_most_1, s_sum_1, s)
    s_lse, t_lse, s_lse_1, confidence = 0.0, 0.0, 0.0, 0.0
    if NORMALIZED:
        s_lse, t_lse = log_sum(s_most, s_sum), log_sum(t_most, t_sum)
        s_lse_1 = s_lse
    label = 0
    if LABELS:
        label = tl.load(labels + row).to(tl.int32)
        if APART:
            s_lse_1 = log_sum(s_most_1, s_sum_1)
        named = (label >= 0) & (label < vocabulary)  # of one that is no token the cross entropy is infinite
        tl.store(ce + row, s_lse_1 - logits(x, x_bias, label, named, x_scale, x_cap, X_BIAS, X_CAP))
        if KIND == "cakld":
            t_lse_1 = log_sum(t_most_1, t_sum_1) if TEMPERED else t_lse
            confidence = tl.exp(logits(t, t_bias, label, named, t_scale, t_cap, T_BIAS, T_CAP) - t_lse_1)
    TWICE: tl.constexpr = KIND == "kl" or KIND == "mse"  # whether the last pass can find the loss too
    value, inner = zeros, 0.0
    end = (vocabulary - 1) // BLOCK * BLOCK
    if not TWICE or not GRADIENT:
        inners = zeros
        for start in range(0, vocabulary, BLOCK):
            j = end - start + lanes
            has = j < vocabulary
            s = logits(x, x_bias, j, has, x_scale, x_cap, X_BIAS, X_CAP)
            u = logits(t, t_bias, j, has, t_scale, t_cap, T_BIAS, T_CAP)
            if NORMALIZED:
                s, u = _log(s * cold, s_lse), _log(u * cold, t_lse)
            term, slope = _terms(s, u, confidence, beta, KIND)
            value += tl.where(has, term, 0.0)
            if not TWICE:
                inners += tl.exp(s) * slope
        inner = tl.sum(inners, 0)
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            j = (end - start if TWICE else start) + lanes
            has = j < vocabulary
            y = logits(x, x_bias, j, has, x_scale, x_cap, X_BIAS, X_CAP)
            u = logits(t, t_bias, j, has, t_scale, t_cap, T_BIAS, T_CAP)
            if NORMALIZED:
                s, u = _log(y * cold, s_lse), _log(u * cold, t_lse)
            else:
                s = y
            term, slope = _terms(s, u, confidence, beta, KIND)
            if TWICE:
                value += tl.where(has, term, 0.0)
            if KIND == "mse":
                asked = kd_weight * 2 / vocabulary * (s - u)
            elif KIND == "kl":
                asked = kd_weight * temperature * (tl.exp(s) - tl.exp(u))
            elif KIND == "cakld":
                asked = kd_weight * temperature * (tl.exp(s) * (slope - inner) + (1 - confidence) * (tl.exp(s) - tl.exp(u)))
            else:
                asked = kd_weight * temperature * tl.exp(s) * (slope - inner)
            if LABELS:
                p = tl.exp(y - s_lse_1)
                asked += ce_weight * tl.where(j == label, p - 1, p)
            if X_CAP:
                asked *= 1 - (y / x_cap) * (y / x_cap)
            tl.store(g + j, (asked * x_scale).to(g.dtype.element_ty), has)
    if KIND == "mse":
        tl.store(kd + row, tl.sum(value, 0) / vocabulary)
    else:
        tl.store(kd + row, tl.sum(value, 0) * temperature * temperature)


def tile(vocabulary: int) -> dict[str, int]:
    """Tokens that a program reads at a time."""
    return {"BLOCK": min(2048, triton.next_power_of_2(vocabulary)), "num_warps": 8 if vocabulary > 1024 else 4}


def towards_whole(x: Tensor, teacher: Tensor, labels: Tensor | None, task: Task, into: Tensor | None) -> Losses:
    """As the reference."""
    rows, vocabulary = x.shape
    loss, student, towards = task.loss, task.student, task.teacher
    if loss.rule.confidence and labels is None:
        raise labels_missing()
    kd, ce = torch.empty(rows, device=x.device), torch.zeros(rows, device=x.device)
    g = x if into is None else into
    with torch.cuda.device_of(x):
        _row[(rows,)](
            x, teacher, g, pointer(student, x), pointer(towards, x), x if labels is None else labels, kd, ce,
            vocabulary, x.stride(0), teacher.stride(0), g.stride(0),
            float(student.scale), float(student.softcap or 0), float(towards.scale), float(towards.softcap or 0),
            float(loss.temperature), float(loss.beta), float(task.kd_weight), float(task.ce_weight),
            KIND=kind_of(loss), TEMPERED=loss.temperature != 1, LABELS=labels is not None, GRADIENT=into is not None,
            X_BIAS=student.bias is not None, X_CAP=student.softcap is not None, T_BIAS=towards.bias is not None, T_CAP=towards.softcap is not None,
            **tile(vocabulary),
        )  # fmt: skip
    return Losses(kd, ce)


def kind_of(loss: Loss) -> str:
    """The kind that the kernels know: kd is kl, and so is one end of jsd."""
    ends = {0.0: "kl", 1.0: "rkl"}
    return "kl" if loss.kind == "kd" else ends.get(loss.beta, "jsd") if loss.kind == "jsd" else loss.kind


def pointer(finish: Finish, other: Tensor) -> Tensor:
    """The bias, or what stands in its place unread."""
    return other if finish.bias is None else finish.bias.contiguous()
