"""`angelslim`: finds the command, turns errors into one line and an exit code. Imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from typing import Any

import click

from ..errors import AngelslimError, PluginError
from ..parallel import is_first

# name -> (module, attribute, help): the help is here so that listing commands imports none of them
COMMANDS = {
    "run": ("run", "run", "Compress a model into a new folder."),
    "eval": ("eval", "eval_", "Perplexity and KL of a folder, measured on the saved files."),
    "inspect": ("inspect", "inspect_", "Describe a model folder from its headers."),
    "validate": ("validate", "validate", "Check an output folder."),
    "convert": ("convert", "convert", "Write a model in another layout, or as GGUF."),
    "report": ("report", "report", "Write an HTML report of an output folder."),
    "chat": ("chat", "chat", "Talk to a model folder."),
    "demo": ("demo", "demo", "Fetch a small real model, compress it three ways, compare."),
    "recipe": ("recipe", "recipe", "Schema, check, template and list of recipes."),
    "plugins": ("plugins", "plugins", "Installed plugins; start a new one."),
    "passes": ("passes", "passes", "Passes that plugins bring."),
    "kernels": ("kernels", "kernels", "Operations and their implementations."),
}


class Commands(click.Group):
    """Built-in commands, imported on use, and the groups of plugins, loaded when their name is typed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            module, attribute, _ = COMMANDS[name]
            command = getattr(importlib.import_module(f".{module}", __package__), attribute)
            assert isinstance(command, click.Command)
            return command
        return _plugin_group(ctx, name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            if close:
                raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", ctx) from None
            raise


def _plugin_group(ctx: click.Context, name: str) -> click.Command | None:
    """The commands of an installed plugin of that name; only this plugin is imported."""
    from ..plugins import PluginHost, installed

    if name not in installed():
        return None
    host = PluginHost(ctx.params.get("block_plugins") or ())
    host.load([name])
    group = click.Group(name, help=f"Commands of the plugin {name}.")
    if not host.add_commands(name, group):
        raise PluginError(16, name, "this plugin adds no commands", "see angelslim passes list --plugins " + name)
    return group


def _blocked(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str]:
    names = [n for n in (value or "").split(",") if n]
    if names:  # commands make their own hosts, which read the environment
        os.environ["ANGELSLIM_BLOCK_PLUGINS"] = ",".join([*filter(None, [os.environ.get("ANGELSLIM_BLOCK_PLUGINS")]), *names])
    return names


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="angelslim-core", prog_name="angelslim")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--no-color", is_flag=True, help="No colours on stderr.")
@click.option("--log-level", default="warning", type=click.Choice(["debug", "info", "warning", "error"]), help="Log messages on stderr.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--block-plugins", callback=_blocked, metavar="A,B", help="Plugins that may not be loaded.")
def cli(quiet: bool, no_color: bool, log_level: str, offline: bool, block_plugins: list[str]) -> None:
    """Make large models smaller, faster and servable."""
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if quiet:
        os.environ["ANGELSLIM_QUIET"] = "1"
    if no_color:
        os.environ["NO_COLOR"] = "1"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; always ends in SystemExit."""
    # set before any of the libraries that read them is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # threads that spin while they wait slow each other down on shared cores, up to tenfold
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(_guarded(given))


def _guarded(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        return cli.main(args=arguments, prog_name="angelslim", standalone_mode=False) or 0
    except AngelslimError as error:
        if not is_first():
            return error.exit_code
        return _show(error.code, error.where, error.what, error.hint, error.exit_code, as_json)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "angelslim"
        return _show("AS-USE-000", where, error.format_message(), f"{where} --help", 2, as_json)
    except click.ClickException as error:
        return _show("AS-USE-000", "angelslim", error.format_message(), "", 2, as_json)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # the reader of our stdout went away; nothing is left to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="angelslim-", suffix=".log", delete=False) as log:
            log.write(traceback.format_exc())
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return _show("AS-BUG-000", "angelslim", what, f"this is a bug of ours; please report {log.name}", 1, as_json)


def _show(code: str, where: str, what: str, hint: str, exit_code: int, as_json: bool) -> int:
    what, hint = " ".join(what.split()), " ".join(hint.split())
    click.echo(f"error[{code}] {where}: {what}" if where else f"error[{code}] {what}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    if as_json:
        document: dict[str, Any] = {"schema_version": 1, "error": {"code": code, "where": where, "what": what, "hint": hint}}
        click.echo(json.dumps(document))
    return exit_code


if __name__ == "__main__":
    main()
