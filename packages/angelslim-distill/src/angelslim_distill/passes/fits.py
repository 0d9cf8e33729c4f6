"""What steps of this package need of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Distilling
from .blockwise import Blockwise

if TYPE_CHECKING:
    from angelslim_core.plan import Plan


def check(plan: Plan) -> None:
    """
    Raises:
        PlanError: as their `check` raises.
    """
    for step in plan.steps:
        if isinstance(step.pass_, Distilling | Blockwise):
            step.pass_.check(plan)
