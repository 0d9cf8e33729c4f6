"""The plugin of distillation; nothing heavy is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from angelslim_core import hookimpl
from angelslim_core.errors import RecipeError

if TYPE_CHECKING:
    import click

    from angelslim_core.kernels import Kernel
    from angelslim_core.passes import Pass
    from angelslim_core.plan import Plan

ANGELSLIM_HOOKS = 1


@hookimpl
def angelslim_register_kernels() -> list[Kernel]:
    from .kernels.gradient import LOSS_GRADIENT
    from .kernels.scaling import SCALE

    return [LOSS_GRADIENT, SCALE]


@hookimpl
def angelslim_register_passes() -> list[type[Pass]]:
    from .passes import PASSES

    return [*PASSES]


@hookimpl
def angelslim_modify_plan(plan: Plan) -> None:
    from .passes.fits import check

    check(plan)


@hookimpl
def angelslim_register_commands(cli: click.Group) -> None:
    from .cli import add_commands

    add_commands(cli)


@hookimpl
def angelslim_default_steps() -> list[dict[str, Any]]:
    raise RecipeError(401, "distill", "has no default preset, since distillation needs a teacher and data", "name a step in a recipe: distill.logits")
