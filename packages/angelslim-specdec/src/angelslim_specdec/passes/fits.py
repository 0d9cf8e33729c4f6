"""Which steps a pass of this package can stand beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from angelslim_core.errors import PlanError

from .trained import Trained

if TYPE_CHECKING:
    from angelslim_core.plan import Plan


def check(plan: Plan) -> None:
    """
    Raises:
        PlanError: a step leaves no model that can be decoded speculatively, or as `Trained.check` raises.
    """
    for step in plan.steps:
        if not step.pass_.id.startswith("specdec."):
            continue
        where = plan.recipe.where(f"steps[{step.index}]")
        if sparse := next((s.pass_.id for s in plan.steps if s.pass_.id.startswith("sparseattn.")), None):
            raise PlanError(702, where, f"{step.pass_.id} verifies with attention to all tokens, which {sparse} replaces", "make two outputs")
        if head := next((s.name for s in plan.description.sites if s.role == "head" and s.name in plan.schemes), None):
            raise PlanError(703, where, f"{step.pass_.id} needs a head of plain weights, and {head} would be quantized", "leave the head out of the targets")
        if isinstance(step.pass_, Trained):
            step.pass_.check(plan)
