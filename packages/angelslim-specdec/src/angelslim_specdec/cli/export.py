"""`angelslim specdec export`."""

from __future__ import annotations

import click

from angelslim_core.cli.common import emit, host_of, json_option, plugins_option, size

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@click.command("export")
@click.option("--draft", required=True, metavar="D", help="Folder of the draft.")
@click.option("--to", required=True, type=click.Choice(["vllm", "sglang", "speculators", "zlab"]), help="Layout to write.")
@click.option("--out", required=True, metavar="D2", help="Folder to write.")
@click.option("--model", metavar="M", help="Target, as folder or hub id: its positions, precision and head are then compared, or used where needed.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the weights; as stored if not given, FP16 for SGLang beside an FP8 target.")
@click.option("--k", type=click.IntRange(min=1), help="Tokens that the engine is told to propose; 4, or a block's, if not given.")
@click.option("--check", is_flag=True, help="Write nothing: compare an export in --out with the draft.")
@click.option("--replace", is_flag=True, help="Replace an existing folder once the new one is complete.")
@plugins_option
@json_option
def command(
    draft: str, to: str, out: str, model: str | None, dtype: str | None, k: int | None, check: bool, replace: bool, plugins: list[str], as_json: bool
) -> None:
    """Write a draft as an engine reads it, and check every way in which it would load and accept nothing."""
    host_of(plugins)
    from ..export import export_draft

    found = export_draft(draft, to, out, model=model, dtype=DTYPES[dtype] if dtype else None, k=k, replace=replace, check=check)
    if as_json:
        emit(found)
        return
    for line in found["warnings"]:
        click.echo(f"warning: {line}", err=True)
    click.echo(f"{found['draft']}, {found['tensors']} tensors, {size(found['bytes'])} of {found['dtype']}   {found['path']}")
    click.echo(f"read as {to} reads it, {len(found['checks'])} ways to go wrong: none")
    click.echo(found["serve"])
