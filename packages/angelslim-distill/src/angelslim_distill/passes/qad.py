"""Quantization-aware distillation.

Source: arXiv:2601.20088 (pure forward KL, the model itself as teacher), arXiv:2402.10631 (cakld for few bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from angelslim_core.errors import PlanError
from angelslim_core.passes import TrainedPass

from .base import Distilling, Options

if TYPE_CHECKING:
    from torch.nn import Module

    from angelslim_core.context import Context
    from angelslim_core.plan import Plan

_HINT = "put a step such as quant.seq2 before it"


class Qad(Distilling):
    """Trains a model that rounds towards the distributions of the next token that it has without rounding."""

    id = "distill.qad"

    class Config(Options):
        pass

    def check(self, plan: Plan) -> None:
        super().check(plan)
        if not any(isinstance(s.pass_, TrainedPass) for s in plan.steps[: self.index]):
            raise PlanError(911, plan.recipe.where(f"steps[{self.index}]"), f"{self.id} trains linears that round, and no step before it says how", _HINT)

    def run(self, model: Module, context: Context) -> Mapping[str, Any]:
        from angelslim_core.fake_quant import placed

        if not placed(model):
            raise PlanError(912, self.id, "trains linears that round, and none of the model's does", _HINT)
        return super().run(model, context)
