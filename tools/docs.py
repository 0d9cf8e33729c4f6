"""Regenerate what the docs repeat from the code; text outside the markers stays.

python tools/docs.py            # rewrite, and start a page for every pass that has none
python tools/docs.py --check    # write nothing, exit 1 if anything would change
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from angelslim_core import errors, hookspecs, recipe
from angelslim_core.adapters.base import GROUPS, Site
from angelslim_core.cli.main import cli
from angelslim_core.engines import ENGINES, TABLE, kind
from angelslim_core.passes import Pass, WeightPass
from angelslim_core.plugins import OFFICIAL, PluginHost, installed

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
EXAMPLE = (1024, 4096)


def official_host() -> PluginHost:
    """A host with every official plugin that is installed."""
    host = PluginHost()
    found = installed()
    host.load(name for name in OFFICIAL if name in found)
    return host


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# what pydantic knows ----------------------------------------------------------------------------------------------------


def type_text(entry: Mapping[str, Any]) -> str:
    """Type and limits of a JSON Schema property, for people."""
    if "enum" in entry or "const" in entry:
        return " or ".join(f"`{v}`" for v in entry.get("enum", [entry.get("const")]))
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(type_text(e) for e in entry["anyOf"] if e.get("type") != "null"))
    if entry.get("type") == "array":
        return f"list of {type_text(entry.get('items', {}))}"
    if "$ref" in entry:
        return entry["$ref"].rsplit("/", 1)[-1]
    name = {"integer": "int", "number": "float", "boolean": "bool", "object": "mapping"}.get(entry.get("type", ""), entry.get("type", "any"))
    limits = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    return ", ".join([name, *(f"{sign} {entry[key]}" for key, sign in limits if key in entry)])


def default_text(name: str, entry: Mapping[str, Any], required: Sequence[str]) -> str:
    """Default of a JSON Schema property."""
    if name in required:
        return "required"
    value = entry.get("default")
    return "" if value is None or value in ([], {}) else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def fields(schema: Mapping[str, Any], prefix: str = "") -> str:
    """Table of the properties of an object schema."""
    required = schema.get("required", ())
    rows = [(f"`{prefix}{n}`", type_text(e), default_text(n, e, required), e.get("description", "")) for n, e in schema.get("properties", {}).items()]
    return table(("name", "type", "default", "meaning"), rows)


def recipe_part() -> str:
    """Every field of a recipe, a table a section."""
    schema = recipe.Recipe.model_json_schema(by_alias=True)
    parts, top = [], []
    for name, entry in schema["properties"].items():
        found = re.search(r'"#/\$defs/(\w+)"', json.dumps(entry))
        required = name in schema.get("required", ())
        if found is None:
            top.append((f"`{name}`", type_text(entry), default_text(name, entry, ()), entry["description"]))
            continue
        listed, section = entry.get("type") == "array", schema["$defs"][found[1]]
        parts.append(
            f"**`{name}`**{' (required)' if required else ''}: {recipe.Recipe.model_fields[name].description}\n\n{fields(section, f'{name}[].' if listed else f'{name}.')}"
        )
    return "\n\n".join([table(("name", "type", "default", "meaning"), top), *parts])


# passes -----------------------------------------------------------------------------------------------------------------


def bare(pass_: type[Pass]) -> Pass | None:
    """A pass with its defaults; None where options must be given."""
    if pass_.Config.model_json_schema().get("required"):
        return None
    try:
        return pass_()
    except ValidationError:  # one of several options must be given
        return None


def pass_part(pass_: type[Pass], host: PluginHost) -> str:
    """Docstring, facts and options of a pass, and with its defaults: what it writes and which engines load it."""
    listed = lambda values: ", ".join(f"`{v}`" for v in sorted(values))  # noqa: E731
    facts = [f"Kind: {pass_.kind.value}."]
    if issubclass(pass_, WeightPass):
        facts.append(f"Default targets: {listed(pass_.default_targets)}.")
    schema = pass_.Config.model_json_schema()
    # options may decide what a pass claims
    found = bare(pass_)
    claims = found.claims if found else () if isinstance(pass_.claims, property) else pass_.claims
    for label, values in (("Claims", claims), ("Needs an earlier step", pass_.requires), ("Excludes", pass_.conflicts)):
        if values:
            facts.append(f"{label}: {listed(values)}.")
    if found:
        facts.append(f"Calibration data: {'needed' if found.needs_calibration else 'none'}.")
    text = [inspect.cleandoc(pass_.__doc__ or ""), " ".join(facts)]
    text.append(f"Options (`with:`):\n\n{fields(schema)}" if schema.get("properties") else "No options.")
    return "\n\n".join([*text, *_stored(pass_, host)])


def _stored(pass_: type[Pass], host: PluginHost) -> list[str]:
    found = bare(pass_)
    if not isinstance(found, WeightPass):
        return []
    rows, columns = EXAMPLE
    site = Site("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight", "up", 0, EXAMPLE, "BF16")
    try:
        scheme = found.scheme(site)
    except errors.AngelslimError:
        return []
    if scheme is None or scheme.exporters[0] not in host.registry.exporters:
        return []
    exporter = host.registry.exporters[scheme.exporters[0]]()
    tensors = [(f"`{n}`", spec.dtype, " x ".join(map(str, spec.shape))) for n, spec in sorted(exporter.layout(EXAMPLE, scheme).items())]
    engines = []
    for engine in ENGINES:
        for layout in scheme.exporters:
            row = TABLE.get((engine, layout, kind(scheme)))
            if row is not None:
                engines.append((engine, layout, "yes" if row.ok else "no", row.why + ("; every dimension a multiple of the block" if row.aligned else "")))
    found = f"\n\n{table(('engine', 'layout', 'loads it', 'why'), engines)}" if engines else " none."
    return [
        f"Written with the defaults for a BF16 linear of {rows} x {columns}, layout `{exporter.name}`:\n\n{table(('tensor', 'dtype', 'shape'), tensors)}",
        f"Engines, as the plan predicts for the defaults (what is not listed is not known to load):{found}",
    ]


def index_part(host: PluginHost) -> str:
    """All passes, linked."""
    rows = [(f"[{i}]({i}.md)", p.kind.value, p.summary()) for i, p in sorted(host.registry.passes.items())]
    return table(("pass", "kind", "what it does"), rows)


# hooks, commands, errors -------------------------------------------------------------------------------------------------


def hook_names() -> list[str]:
    """Every hook of the specification, in its order."""
    return [name for name, value in vars(hookspecs).items() if name.startswith("angelslim_") and callable(value)]


def hooks_part() -> str:
    """Hooks with their arguments."""
    rows = []
    for name in hook_names():
        function = getattr(hookspecs, name)
        options = function.angelslim_spec
        calls = "first result wins" if options["firstresult"] else "also for plugins loaded earlier" if options["historic"] else "every plugin"
        rows.append((f"[`{name}`](#{name})", ", ".join(f"`{p}`" for p in inspect.signature(function).parameters), calls))
    return table(("hook", "arguments", "called"), rows)


def walk(group: click.Group, context: click.Context, prefix: str = "angelslim") -> list[tuple[str, click.Command]]:
    """(full name, command) of every command that does something."""
    found: list[tuple[str, click.Command]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command
        full = f"{prefix} {name}"
        found += walk(command, click.Context(command, info_name=name, parent=context), full) if isinstance(command, click.Group) else [(full, command)]
    return found


def parameters(command: click.Command) -> str:
    """Arguments and options of a command."""
    rows = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            rows.append((f"`{parameter.make_metavar(click.Context(command))}`", "argument", ""))
        elif isinstance(parameter, click.Option):
            names = ", ".join(f"`{n}`" for n in (*parameter.opts, *parameter.secondary_opts))
            kind_ = "flag" if parameter.is_flag else _option_type(parameter)
            default = parameter.default
            shown = default if isinstance(default, str | int | float) and not isinstance(default, bool) else None
            rows.append((names, kind_, f"{parameter.help or ''}{f' Default: {shown}.' if shown is not None else ''}"))
    return table(("option", "value", "meaning"), rows)


def _option_type(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return " or ".join(f"`{c}`" for c in option.type.choices)
    text = f"`{option.metavar}`" if option.metavar else {"integer range": "int", "float range": "float"}.get(option.type.name, option.type.name)
    if isinstance(option.type, click.IntRange | click.FloatRange) and option.type.min is not None:
        text += f" >= {option.type.min}"
    return text + (", repeatable" if option.multiple else "")


def commands_part(host: PluginHost) -> str:
    """Every command, those of the official plugins included."""
    context = click.Context(cli, info_name="angelslim")
    commands = walk(cli, context)
    for name in host.loaded:
        group = click.Group(name)
        if host.add_commands(name, group):
            commands += walk(group, click.Context(group, info_name=name, parent=context), f"angelslim {name}")
    parts = [f"### angelslim\n\nOptions before the command:\n\n{parameters(cli)}"]
    for name, command in commands:
        usage = " ".join([name, *command.collect_usage_pieces(click.Context(command))])
        parts.append(f"### {name}\n\n    {usage}\n\n{inspect.cleandoc(command.help or '')}\n\n{parameters(command)}")
    return "\n\n".join(parts)


def exit_part() -> str:
    """Exit codes, from the error classes."""
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.AngelslimError) and c is not errors.AngelslimError]
    by_code: dict[int, list[type[errors.AngelslimError]]] = {}
    for found in classes:
        by_code.setdefault(found.exit_code, []).append(found)
    rows = {
        code: (", ".join(f"`AS-{c.family}-...`" for c in found), " ".join(inspect.cleandoc(c.__doc__ or "") for c in found)) for code, found in by_code.items()
    }
    rows |= {
        0: ("", "Done."),
        1: ("`AS-BUG-000`", "A bug of ours; the hint names a file with the traceback."),
        130: ("", "Interrupted at once (a second Ctrl-C)."),
    }
    rows[8] = (rows[8][0], f"{rows[8][1]} Also `validate` of a folder that is not ok.")
    return table(("exit code", "error codes", "meaning"), [(str(code), *row) for code, row in sorted(rows.items())])


def roles_part() -> str:
    """Roles by group."""
    groups: dict[str, list[str]] = {}
    for role, names in GROUPS.items():
        for name in names:
            groups.setdefault(name, []).append(role)
    return table(("group", "roles"), [(f"`{group}`", ", ".join(f"`{r}`" for r in roles)) for group, roles in groups.items()])


def shipped_part() -> str:
    """Recipes that ship with the core."""
    rows = [(f"`{name}`", text.splitlines()[0].removeprefix("# ")) for name, text in recipe.shipped().items()]
    return table(("recipe", "what it does"), rows)


# files -------------------------------------------------------------------------------------------------------------------


def parts(host: PluginHost) -> dict[str, Callable[[], str]]:
    """Name of a generated part -> what writes it."""
    made: dict[str, Callable[[], str]] = {
        "recipe": recipe_part, "roles": roles_part, "shipped": shipped_part, "hooks": hooks_part, "exit codes": exit_part,
        "commands": lambda: commands_part(host), "passes": lambda: index_part(host),
    }  # fmt: skip
    made |= {f"pass {i}": lambda p=p: pass_part(p, host) for i, p in host.registry.passes.items()}  # type: ignore[misc]
    return made


def wanted(folder: Path, host: PluginHost) -> dict[Path, str]:
    """File -> what it should hold; pages that are missing are begun.

    Raises:
        ValueError: a marker names nothing that can be generated, or lacks its end.
    """
    known = parts(host)
    found = {}
    pages = {folder / "algorithms" / f"{i}.md": f"# {i}\n\n<!-- generated: pass {i} -->\n<!-- end -->\n" for i in host.registry.passes}
    for path in sorted({*folder.rglob("*.md"), *pages}):
        text = path.read_text(encoding="utf-8") if path.exists() else pages[path]

        def replaced(match: re.Match[str], path: Path = path) -> str:
            if match[2] not in known:
                raise ValueError(f"{path.name}: nothing generates {match[2]!r}; known: {', '.join(known)}")
            return f"{match[1]}\n{known[match[2]]()}\n\n{match[3]}"

        found[path] = BLOCK.sub(replaced, text)
        if text.count("<!-- generated: ") != len(BLOCK.findall(text)):
            raise ValueError(f"{path.name}: a generated part lacks its <!-- end -->")
        if path in pages and f"<!-- generated: pass {path.stem} -->" not in text:
            raise ValueError(f"{path.name}: lacks <!-- generated: pass {path.stem} -->")
    return found


def outdated(folder: Path, host: PluginHost) -> dict[Path, str]:
    """Files that are missing or not as they should be -> what they should hold."""
    return {p: t for p, t in wanted(folder, host).items() if not p.exists() or p.read_text(encoding="utf-8") != t}


def main(arguments: Sequence[str]) -> int:
    """Rewrite the docs, or with `--check` only compare."""
    if list(arguments) not in ([], ["--check"]):
        print(__doc__)
        return 2
    changes = outdated(DOCS, official_host())
    for path, text in changes.items():
        print(f"{'outdated' if arguments else 'wrote'}: {path.relative_to(DOCS.parent)}")
        if not arguments:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if changes and arguments:
        print("run: python tools/docs.py")
    return 1 if changes and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
