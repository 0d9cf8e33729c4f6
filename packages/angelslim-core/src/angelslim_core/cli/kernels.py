"""`angelslim kernels`."""

from __future__ import annotations

import click

from .common import emit, json_option, plugins_option, table


@click.group("kernels")
def kernels() -> None:
    """Operations and their implementations."""


@kernels.command("list")
@plugins_option
@json_option
def list_(plugins: list[str], as_json: bool) -> None:
    """List operations, their implementations, and which this machine can run."""
    from ..plugins import OFFICIAL, PluginHost, installed

    host = PluginHost()
    host.load(plugins or [name for name in OFFICIAL if name in installed() and name not in host.blocked])
    rows = [kernel.describe() for kernel in host.registry.kernels.values()]
    if as_json:
        emit({"kernels": rows})
        return
    if not rows:
        click.echo("the loaded plugins bring no kernels")
    else:
        table(
            [(r["op"], i["name"], "yes" if i["ok"] else "no", i["why"]) for r in rows for i in r["implementations"]],
            ("op", "implementation", "runs here", "why"),
        )
