"""`angelslim report`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import emit, json_option


@click.command("report")
@click.argument("out", nargs=-1, required=True)
@click.option("-o", "--output", "target", default="report.html", show_default=True, metavar="FILE", help="HTML file to write.")
@json_option
def report(out: tuple[str, ...], target: str, as_json: bool) -> None:
    """Write one HTML file about one or more output folders."""
    from ..report import write_report

    write_report([Path(folder) for folder in out], Path(target))
    if as_json:
        emit({"path": target})
    else:
        click.echo(target)
