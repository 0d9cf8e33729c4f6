"""`angelslim validate`."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import click

from .common import emit, host_of, json_option, plugins_option, progress, table


@click.command("validate")
@click.argument("out")
@click.option("--base", metavar="M", help="The source: adds SQNR and cosine per linear.")
@click.option("--run", "run_it", is_flag=True, help="Also load it, generate, and with --base measure KL on what it writes.")
@plugins_option
@json_option
def validate(out: str, base: str | None, run_it: bool, plugins: list[str], as_json: bool) -> None:
    """Check a folder: headers, checksums, ledger, finite numbers, equal scales where engines need them, the ignore list.

    Every quantized linear is read twice, by its layout's reader and by a second one that shares no code with it.
    """
    from ..validation import validate as check

    with progress("validating") as report:
        found = check(out, base, run=run_it, progress=report, host=host_of(plugins))
    if as_json:
        emit(found)
    else:
        for line in found["problems"]:
            click.echo(f"problem: {line}")
        if found.get("linears"):
            worst = sorted(found["linears"], key=lambda row: row["sqnr_db"] if row["sqnr_db"] is not None else 1e9)[:5]
            table(
                [(r["name"], f"{r['sqnr_db']:.2f}" if r["sqnr_db"] is not None else "exact", f"{r['cosine']:.6f}") for r in worst],
                ("worst linears", "SQNR dB", "cosine"),
            )
        _show_stored(found)
        if found.get("sample"):
            click.echo(f"it writes: {found['sample']}")
        if found.get("kl") is not None:
            click.echo(f"KL(base, out) on the base's own sample: {found['kl']:.4f} nats per token")
        click.echo("ok" if found["ok"] else f"not ok: {len(found['problems'])} problem(s)")
    if not found["ok"]:
        sys.exit(8)


def _show_stored(found: dict[str, Any]) -> None:
    if "readers" in found:
        readers = found["readers"]
        second = f"{len(readers['differ'])} differ" if readers["second"] else "no second reader knows this layout"
        click.echo(f"quantized linears: {readers['linears']}, read twice: {second}")
        left = Counter((row["role"], row["ignored"]) for row in found["unquantized"])
        parts = [f"{count} {role}{'' if ignored else ' (not in the ignore list)'}" for (role, ignored), count in sorted(left.items())]
        click.echo(f"stayed unquantized: {', '.join(parts) or 'none'}")
    if "engines" in found:
        table([(name, "yes" if v["ok"] else "no", v["why"]) for name, v in found["engines"].items()], ("engine", "loads it", "why"))
