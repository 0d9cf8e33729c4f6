"""What this package brings; nothing heavy is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from angelslim_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import click
    import pluggy

ANGELSLIM_HOOKS = 1


@hookimpl
def angelslim_addhooks(pluginmanager: pluggy.PluginManager) -> None:
    from .registry import offer

    offer(pluginmanager)


@hookimpl
def angelslim_register_commands(cli: click.Group) -> None:
    from .cli import add_commands

    add_commands(cli)
