"""`angelslim convert`."""

from __future__ import annotations

import click

from .common import emit, host_of, json_option, plugins_option, progress, size


@click.command("convert")
@click.argument("folder")
@click.argument("out")
@click.option("--to", required=True, metavar="LAYOUT", help="compressed-tensors, gptq, awq, fp8, modelopt, packed, or gguf (OUT is then a file).")
@click.option("--type", "kind", metavar="TYPE", help="For gguf: auto (default), f16, bf16, q8_0, q4_0, q4_1, q2_0, tq1_0, tq2_0, or stq1_0 (experimental).")
@plugins_option
@json_option
def convert(folder: str, out: str, to: str, kind: str | None, plugins: list[str], as_json: bool) -> None:
    """Write a model in another layout, its codes unchanged; what the layout cannot hold is refused.

    From compressed-tensors, GPTQ, AWQ, Model Optimizer, block FP8 or packed into one another, or any of them or a plain
    model into a GGUF file for llama.cpp.
    """
    from ..conversion import convert as run

    with progress("converting") as report:
        found = run(folder, out, to, kind, progress=report, host=host_of(plugins))
    if as_json:
        emit(found)
        return
    for line in found["warnings"]:
        click.echo(f"warning: {line}", err=True)
    same = "the same weights" if not found.get("rounded") else f"{found['rounded']} tensors rounded"
    types = ", ".join(f"{count} {name}" for name, count in found.get("tensors", {}).items())
    click.echo(f"{found['from']} -> {found['to']}{f' ({types})' if types else ''}: {found['linears']} quantized linears, {same}")
    click.echo(f"{size(found['bytes_before'])} -> {size(found['bytes_after'])}   {found['path']}")
