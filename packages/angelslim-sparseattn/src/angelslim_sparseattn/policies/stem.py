"""Stem: top blocks by antidiagonal scores and the size of values, fewer for later rows.

Source: arXiv:2603.06274; `score="mass"` is XAttention's estimate (arXiv:2503.16428) in the place of the paper's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import budgets
from ..block_index import own_blocks
from ..estimators import antidiagonal_mass, antidiagonal_mean, value_bias
from ..kernels.select_rows import SELECT_ROWS, Rule
from ..patterns import causal
from ..prefill import Kept, Prefill, Span
from .base import MOST_BLOCKS, MOST_TOKENS
from .strided import Stride, Strided

# blocks that the paper's schedule keeps at least, first and near ones counted
PAPER_FLOOR = 54


class Stem(Strided):
    """First and near blocks, and beside them the top K of each row.

    With `rate` K is ceil(rate * P) + bias, P the prompt's blocks; without it K falls by the schedule's own numbers, which keep
    prompts below 56 blocks dense. With `tau`, which needs `score: mass`, a row keeps no count but the heaviest while the mass before
    is below a share of its own, first and near blocks included; from row to row that share falls from tau to alpha * tau.
    """

    looks_ahead: ClassVar[bool] = True  # the values' mean, and K, which follows from the prompt's length

    rate: float | None = Field(None, gt=0, le=1, description="selected blocks a row as a share of the prompt's; none: the schedule's")
    bias: int = Field(0, ge=0, le=MOST_BLOCKS, description="selected blocks a row beside `rate`")
    tau: float | None = Field(None, gt=0, le=1, description="share of the estimated attention that the first row keeps, in the place of K")
    alpha: float | None = Field(
        None, gt=0, le=1, description="K, or the share, of the last row over that at the start; none: 0.7, with `rate` 1, with `tau` 0.9"
    )
    schedule: Literal["code", "paper"] = Field("code", description="where K begins to fall: at row K, as the authors' code, or at row 0")
    cap: int | None = Field(None, ge=1, le=MOST_BLOCKS, description="most selected blocks a row")
    score: Literal["mean", "mass"] = Field("mean", description="antidiagonals' mean, as the authors' code, or the logarithm of the attention they estimate")
    lam: float = Field(0.2, ge=0, le=1000, description="weight of the values' term")
    value_term: Literal["znorm", "log"] = Field("znorm", description="the values' term: z-scores of log norms, or log norms")
    stride: Stride = 16
    n_init: int = Field(512, ge=0, le=MOST_TOKENS, description="first tokens, beside the selected blocks")
    n_local: int = Field(512, ge=0, le=MOST_TOKENS, description="tokens up to a query's block, beside the selected blocks")

    @model_validator(mode="after")
    def _bias_needs_rate(self) -> Stem:
        if self.bias and self.rate is None:
            raise ValueError("bias adds to rate, which is not set")
        return self

    @model_validator(mode="after")
    def _tau_takes_the_place_of_k(self) -> Stem:
        if self.tau is not None:
            if self.score != "mass":
                raise ValueError("tau is a share of mass: it needs score: mass")
            if others := [name for name in ("rate", "cap") if getattr(self, name) is not None] + ["schedule"] * (self.schedule != "code"):
                raise ValueError(f"tau takes the place of K, which {others[0]} sets")
        return self

    def budget(self, s: Prefill | Span) -> Tensor:
        """K [Pq], on the CPU."""
        p, blocks = own_blocks(s.q_len, s.kv_len, s.block, s.block)[1], -(-s.prompt_len // s.block)
        alpha = self.alpha if self.alpha is not None else 1.0 if self.rate is not None else 0.7
        start = None if self.rate is None else budgets.share(self.rate, blocks) + self.bias
        if self.schedule == "code":
            found = budgets.decayed(p, blocks, budgets.code_start(blocks) if start is None else start, alpha)
        elif start is not None:
            found = budgets.paper(p, blocks, start, alpha)
        else:
            forced = -(-self.n_init // s.block) + -(-self.n_local // s.block)
            found = budgets.paper(p, blocks, budgets.paper_start(blocks, s.prompt_len), alpha).clamp(min=max(1, PAPER_FLOOR - forced))
        return found if self.cap is None else found.clamp(max=self.cap)

    def keep(self, s: Prefill) -> Kept:
        bias = value_bias(s, self.stride, self.value_term) if self.lam else None
        if self.score == "mean":
            score = antidiagonal_mean(s, self.stride, bias, self.lam)
        else:
            score = antidiagonal_mass(s, self.stride)
            if bias is not None:
                score = _log(score).add_(bias.repeat_interleave(s.groups, 0)[:, None], alpha=self.lam)
        if self.tau is None:
            return Kept(lists=SELECT_ROWS(s, score, _rule(self, s.span)))
        if bias is not None:  # a row's highest becomes 1: nothing that it sees vanishes beside what comes later
            score.sub_(score.masked_fill(~causal(s), -torch.inf).amax(-1, keepdim=True)).exp_()
        return Kept(lists=SELECT_ROWS(s, score, self._share(self.tau, s.prompt_len, s.block)))

    def _share(self, tau: float, prompt_len: int, block: int) -> Rule:
        slope = (1 - (0.9 if self.alpha is None else self.alpha)) / max(1, -(-prompt_len // block) - 1)
        return Rule("top_p", share=tau, slope=slope, n_init=self.n_init, n_local=self.n_local)


def _log(mass: Tensor) -> Tensor:
    """In place; of nothing, that of the least there is, so that the values' term still decides."""
    return mass.clamp_(min=torch.finfo(mass.dtype).tiny).log_()


@lru_cache(16)
def _rule(policy: Stem, span: Span) -> Rule:
    """The same for every layer of a forward."""
    return Rule("top_k", k=tuple(policy.budget(span).tolist()), n_init=policy.n_init, n_local=policy.n_local)
