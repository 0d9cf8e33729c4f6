"""`angelslim recipe`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import emit, json_option, plugins_option, table

TEMPLATE = """\
# yaml-language-server: $schema=./angelslim.schema.json
# The schema: angelslim recipe schema > angelslim.schema.json
version: 1
model: {{path: ./model}}              # or --model; a folder, or a hub id when online
# calibration: {{data: chats.jsonl, samples: 128, tokens: 2048}}   # for passes that look at activations
steps:
  - use: quant.int4_rtn             # angelslim passes list
    with: {{group_size: 128}}
    targets: [attention, mlp]       # roles, groups, names, re: patterns, layers[0:4].mlp
# eval: {{text: heldout.txt}}         # measured on the output before it is published
# gates: {{max_kl: 0.1}}              # not met: nothing is published
export:
  to: ./{name}-out                  # or --out
  # engines: [vllm]                 # refuse, before any work, what this engine cannot load
"""


@click.group("recipe")
def recipe() -> None:
    """Schema, check, template and list of recipes."""


@recipe.command("schema")
@plugins_option
@click.option("--json", "as_json", is_flag=True, help="The schema is JSON either way.")
def schema(plugins: list[str], as_json: bool) -> None:
    """Print the JSON Schema of recipes, with the options of every pass."""
    import json

    from ..plugins import OFFICIAL, PluginHost, installed
    from ..recipe import recipe_schema

    host = PluginHost()
    host.load(dict.fromkeys([*(n for n in OFFICIAL if n in installed() and n not in host.blocked), *plugins]))
    click.echo(json.dumps(recipe_schema(host.registry.passes.values()), indent=2))


@recipe.command("check")
@click.argument("file")
@plugins_option
@json_option
def check(file: str, plugins: list[str], as_json: bool) -> None:
    """Check a recipe and the options of its passes; no model is needed."""
    from ..plugins import PluginHost, required_plugins
    from ..recipe import bind_options, load_recipe

    found = load_recipe(file)
    host = PluginHost()
    host.load(required_plugins([s.use for s in found.steps], plugins))
    for index, step in enumerate(found.steps):
        bind_options(index, found, host.registry.find_pass(step.use, found.where(f"steps[{index}].use")))
    if as_json:
        emit({"ok": True, "steps": [s.use for s in found.steps]})
    else:
        click.echo(f"ok: {', '.join(s.use for s in found.steps)}")


@recipe.command("init")
@click.argument("name")
@json_option
def init(name: str, as_json: bool) -> None:
    """Write a commented recipe to NAME.yaml."""
    from ..errors import OutputError, UsageError

    if Path(name).name != name or not name.isidentifier():
        raise UsageError(20, name, "is no plain name for a recipe", "letters, digits and _")
    path = Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(TEMPLATE.format(name=name))
    except FileExistsError:
        raise OutputError(40, str(path), "exists", "choose another name") from None
    if as_json:
        emit({"path": str(path)})
    else:
        click.echo(f"{path}   next: edit it, then angelslim recipe check {path}")


@recipe.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the recipes that ship with the toolkit."""
    from ..recipe import shipped

    rows = [(name, text.splitlines()[0].removeprefix("# ")) for name, text in shipped().items()]
    if as_json:
        emit({"recipes": [{"name": name, "summary": summary} for name, summary in rows]})
    else:
        table(rows, ("recipe", "what it does"))
