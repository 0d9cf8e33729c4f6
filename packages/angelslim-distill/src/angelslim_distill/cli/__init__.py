"""`angelslim distill ...`, one file a command."""

from __future__ import annotations

import click

from . import cache


def add_commands(group: click.Group) -> None:
    """All commands of this package."""
    group.add_command(cache.command, "cache")
