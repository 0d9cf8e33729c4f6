"""Losses and gradients towards what is kept of a distribution: logits are read twice, gradients written once.

Whatever a loss asks of the logits of tokens that are not kept comes through the logarithm of the sum of exponentials: their probabilities times
one number. Kept tokens and the label are put right afterwards; they are few.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kinds import NOTHING as SMALLEST
from ...losses import kept_losses
from ...targets import TopK
from ..gradient import Losses, Task
from .whole import NOTHING, log_sum, logits, more, pointer, tile


@triton.jit
def _sums(x, bias, out, vocabulary, stride, scale, cap, temperature, rows, TEMPERED: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    # logarithms of sums of exponentials: [0] at temperature 1, [1] at the other
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    most, total = tl.full([BLOCK], NOTHING, tl.float32), tl.zeros([BLOCK], tl.float32)
    most_t, total_t = most, total
    for start in range(0, vocabulary, BLOCK):
        j = start + lanes
        y = logits(x + row * stride, bias, j, j < vocabulary, scale, cap, BIAS, CAP)
        most, total = more(most, total, y)
        if TEMPERED:
            most_t, total_t = more(most_t, total_t, y / temperature)
    lse = log_sum(most, total)
    tl.store(out + row, lse)
    tl.store(out + rows + row, log_sum(most_t, total_t) if TEMPERED else lse)


@triton.jit
def _spread(
    x, g, bias, lse, share, vocabulary, stride, g_stride, scale, cap, temperature, plain, rows,
    TEMPERED: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # probabilities times `plain` and, at the temperature, a row's share
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    lse_1, lse_t, part = tl.load(lse + row), tl.load(lse + rows + row), tl.load(share + row)
    for start in range(0, vocabulary, BLOCK):
        j = start + lanes
        has = j < vocabulary
        y = logits(x + row * stride, bias, j, has, scale, cap, BIAS, CAP)
        if TEMPERED:
            asked = plain * tl.exp(y - lse_1) + part * tl.exp(y / temperature - lse_t)
        else:
            asked = (plain + part) * tl.exp(y - lse_1)
        if CAP:
            asked *= 1 - (y / cap) * (y / cap)
        tl.store(g + row * g_stride + j, (asked * scale).to(g.dtype.element_ty), has)


def towards_kept(x: Tensor, teacher: TopK | None, labels: Tensor | None, task: Task, into: Tensor | None) -> Losses:
    """As the reference."""
    rows, vocabulary = x.shape
    finish, temperature = task.student, task.loss.temperature
    shape = {"TEMPERED": temperature != 1, "BIAS": finish.bias is not None, "CAP": finish.softcap is not None, **tile(vocabulary)}
    numbers = (float(finish.scale), float(finish.softcap or 0), float(temperature))
    lse = torch.empty(2, rows, device=x.device)
    with torch.cuda.device_of(x):
        _sums[(rows,)](x, pointer(finish, x), lse, vocabulary, x.stride(0), *numbers, rows, **shape)
    ids = torch.empty(rows, 0, dtype=torch.int64, device=x.device) if teacher is None else teacher.ids
    y = finish(x.gather(1, ids), ids)
    kd, push, share = torch.zeros(rows, device=x.device), torch.zeros_like(y), torch.zeros(rows, device=x.device)
    if teacher is not None:
        kd, push, share = _towards(y, lse[1], teacher, task, vocabulary, into is not None)
    plain, ce = 0.0, torch.zeros_like(kd)
    if labels is not None:
        plain, at = task.ce_weight, labels[:, None]
        same = ids == at  # a label may be among the kept tokens: both places then get what is asked of it altogether
        ids, push = torch.cat((ids, at), 1), torch.cat((push - plain * same, (push * same).sum(1, keepdim=True) - plain), 1)
        y = finish(x.gather(1, ids), ids)
        ce = lse[0] - y[:, -1]
    if into is None:
        return Losses(kd, ce)
    own = plain * torch.exp(y - lse[0][:, None]) + share[:, None] * torch.exp(y / temperature - lse[1][:, None])
    with torch.cuda.device_of(x):
        _spread[(rows,)](
            x, into, pointer(finish, x), lse, share, vocabulary, x.stride(0), into.stride(0), *numbers, float(plain), rows, **shape
        )  # fmt: skip
    into.scatter_(1, ids, ((own + push) * finish.slope(y)).to(into.dtype))
    return Losses(kd, ce)


def _towards(y: Tensor, lse: Tensor, teacher: TopK, task: Task, vocabulary: int, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [R], and what they ask of the kept tokens' logits [R, K] beside their probabilities, and of all logits in proportion to these [R]."""
    loss = task.loss
    loss.check_kept(tempered=False)
    with torch.enable_grad():
        y, lse = y.detach().requires_grad_(), lse.detach().clone().requires_grad_()
        student = (y / loss.temperature - lse[:, None]).clamp(min=SMALLEST)
        confidence = teacher.label_logp.float().exp()
        kd = kept_losses(student, teacher.logp.float() / loss.temperature, confidence, loss, vocabulary)
        push, share = torch.autograd.grad(kd.sum() * task.kd_weight, (y, lse)) if gradient else (y, lse)
    # a logit moves the logarithm by its probability over the temperature
    return kd.detach(), push, share / loss.temperature
