"""What steps of this package need of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from angelslim_core.plan import Plan


def check(plan: Plan) -> None:
    """
    Raises:
        PlanError: as the `check` of a pass raises.
    """
    for step in plan.steps:
        if step.pass_.id.startswith("distill."):
            step.pass_.check(plan)  # type: ignore[attr-defined]
