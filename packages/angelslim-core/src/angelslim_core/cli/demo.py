"""`angelslim demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import emit, json_option, progress, table


@click.command("demo")
@click.option("--out", default="demo", show_default=True, metavar="D", help="Folder for the three outputs and the report.")
@json_option
def demo(out: str, as_json: bool) -> None:
    """Fetch SmolLM2-135M-Instruct, compress it to INT8, FP8 and INT4, compare, write a report."""
    from ..demo import run_demo, shown

    found = run_demo(Path(out), lambda line: click.echo(line, err=True), progress)
    if as_json:
        emit(found)
        return
    rows = [shown(row) for row in found["rows"]]
    table([tuple(row.values()) for row in rows], tuple(rows[0]))
    click.echo(found["note"])
    click.echo(f"report: {found['report']}   try: angelslim chat {out}/int8")
