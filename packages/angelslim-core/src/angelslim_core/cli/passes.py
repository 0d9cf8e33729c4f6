"""`angelslim passes`."""

from __future__ import annotations

import click

from .common import emit, json_option, plugins_option, table


@click.group("passes")
def passes() -> None:
    """Passes that plugins bring."""


@passes.command("list")
@plugins_option
@json_option
def list_(plugins: list[str], as_json: bool) -> None:
    """List passes of the named plugins, or of all official ones that are installed."""
    from ..plugins import OFFICIAL, PluginHost, installed

    host = PluginHost()
    host.load(plugins or [name for name in OFFICIAL if name in installed() and name not in host.blocked])
    rows = [
        {"id": p.id, "summary": p.summary(), "kind": p.kind.value, "options": p.Config.model_json_schema()}
        for p in sorted(host.registry.passes.values(), key=lambda p: p.id)
    ]
    if as_json:
        emit({"passes": rows})
        return
    options = lambda row: ", ".join(row["options"].get("properties", {}))  # noqa: E731
    table([(str(r["id"]), str(r["kind"]), str(r["summary"]), options(r)) for r in rows], ("id", "kind", "summary", "options"))
