"""`angelslim inspect`."""

from __future__ import annotations

import click

from .common import emit, host_of, json_option, plugins_option, size


@click.command("inspect")
@click.argument("model")
@plugins_option
@json_option
def inspect_(model: str, plugins: list[str], as_json: bool) -> None:
    """Describe a model from its headers: nothing is loaded."""
    from ..inspection import inspect_model

    found = inspect_model(model, host=host_of(plugins))
    if as_json:
        emit(found)
        return
    click.echo(f"{found['architecture']}: {found['layers']} layers, {found['parameters'] / 1e6:.1f} M parameters, {size(found['bytes'])}")
    click.echo("dtypes: " + ", ".join(f"{name} {size(n)}" for name, n in found["dtypes"].items()))
    click.echo("linears: " + ", ".join(f"{count} {role}" for role, count in found["linears"].items()))
    click.echo(
        f"quantization: {found['quantization'] or 'none'}; tied embeddings: {'yes' if found['tied'] else 'no'}; MTP tensors: {found['mtp_tensors']}; tokenizer: {'yes' if found['tokenizer'] else 'no'}"
    )
    for line in found["warnings"]:
        click.echo(f"warning: {line}")
