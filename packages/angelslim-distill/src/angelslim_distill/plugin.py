"""The plugin of distillation. It registers nothing yet, and naming it where it would have to do something is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from angelslim_core import hookimpl
from angelslim_core.errors import RecipeError

if TYPE_CHECKING:
    import click

ANGELSLIM_HOOKS = 1


@hookimpl
def angelslim_register_commands(cli: click.Group) -> None:
    from .cli import add_commands

    add_commands(cli)


@hookimpl
def angelslim_default_steps() -> list[dict[str, Any]]:
    raise RecipeError(401, "distill", "has no default preset, since distillation needs a teacher; it registers no passes yet", "leave it out of --plugins")
