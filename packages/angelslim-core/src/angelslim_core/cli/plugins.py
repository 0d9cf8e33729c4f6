"""`angelslim plugins`."""

from __future__ import annotations

import click

from .common import emit, json_option, table


@click.group("plugins")
def plugins() -> None:
    """Installed plugins; start a new one."""


@plugins.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List installed plugins; none is imported."""
    from ..plugins import installed

    rows = [p for offers in installed().values() for p in offers]
    if as_json:
        emit({"plugins": [{"id": p.id, "dist": p.dist, "version": p.version, "official": p.official, "loaded": False, "summary": p.summary} for p in rows]})
        return
    table([(p.id, p.dist, p.version, "yes" if p.official else "no", p.summary) for p in rows], ("id", "distribution", "version", "official", "summary"))


@plugins.command("new")
@click.argument("name")
@json_option
def new(name: str, as_json: bool) -> None:
    """Start a plugin: copy the template to ./angelslim-NAME."""
    from ..template_copy import copy_template

    folder = copy_template(name)
    if as_json:
        emit({"path": str(folder)})
    else:
        click.echo(f"{folder}   next: pip install -e {folder} && angelslim passes list --plugins {name}")
