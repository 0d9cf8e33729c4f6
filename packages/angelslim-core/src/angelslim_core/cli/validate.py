"""`angelslim validate`."""

from __future__ import annotations

import sys

import click

from .common import emit, host_of, json_option, plugins_option, progress, table


@click.command("validate")
@click.argument("out")
@click.option("--base", metavar="M", help="The source: adds SQNR and cosine per linear.")
@click.option("--run", "run_it", is_flag=True, help="Also load it, generate, and with --base measure KL on what it writes.")
@plugins_option
@json_option
def validate(out: str, base: str | None, run_it: bool, plugins: list[str], as_json: bool) -> None:
    """Check an output folder: headers, checksums, ledger, finite numbers."""
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
        if found.get("sample"):
            click.echo(f"it writes: {found['sample']}")
        if found.get("kl") is not None:
            click.echo(f"KL(base, out) on the base's own sample: {found['kl']:.4f} nats per token")
        click.echo("ok" if found["ok"] else f"not ok: {len(found['problems'])} problem(s)")
    if not found["ok"]:
        sys.exit(8)
