"""`angelslim specdec ...`, one file a command."""

from __future__ import annotations

from importlib import import_module

import click

# command -> module here, which holds it as `command`
COMMANDS: dict[str, str] = {name: name for name in ("invent", "regen", "vocab", "dump", "train", "decode", "export", "check", "bench")}


def add_commands(group: click.Group) -> None:
    """All commands of this package."""
    for name, module in COMMANDS.items():
        group.add_command(import_module(f".{module}", __name__).command, name)
