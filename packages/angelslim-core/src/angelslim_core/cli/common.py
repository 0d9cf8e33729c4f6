"""What commands share: the `--json` option, one document on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..parallel import is_first

if TYPE_CHECKING:
    from ..plugins import PluginHost

Function = TypeVar("Function", bound=Callable[..., Any])


def json_option(function: Function) -> Function:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(function)


def plugins_option(function: Function) -> Function:
    """Add `--plugins a,b`, parsed into a list."""
    split = lambda ctx, param, value: [n for n in (value or "").split(",") if n]  # noqa: E731
    return click.option("--plugins", callback=split, metavar="A,B", help="Plugins to load.")(function)


def host_of(plugins: Sequence[str]) -> PluginHost:
    """A host with these plugins loaded."""
    from ..plugins import PluginHost

    host = PluginHost()
    host.load(plugins)
    return host


def emit(document: dict[str, Any]) -> None:
    """Print the one document of a `--json` call."""
    click.echo(json.dumps({"schema_version": 1, **document}, ensure_ascii=False))


def size(nbytes: float) -> str:
    """Bytes for people, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit in ("B", "kB") else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def show_evaluation(found: Mapping[str, Any]) -> None:
    """What `evaluate` measured."""
    spread = f" +- {found['perplexity_stderr']:.3f}" if found["perplexity_stderr"] is not None else ""
    click.echo(f"perplexity {found['perplexity']:.3f}{spread}, {found['tokens']} tokens, {found['windows']} x {found['length']}, {found['backend']}")
    if "kl" in found:
        spread = f" +- {found['kl_stderr']:.4f}" if found["kl_stderr"] is not None else ""
        click.echo(
            f"base {found['base_perplexity']:.3f}, KL(base, out) {found['kl']:.4f}{spread} nats per token, same first choice {100 * found['top1_agreement']:.2f} %"
        )


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> None:
    """Columns on stdout, aligned."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callback progress(done, total, label): a bar with time left on a terminal, a line every 10 s off it."""
    if os.environ.get("ANGELSLIM_QUIET"):
        yield lambda done, total, label: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, label: bar.update(task, completed=done, total=total, description=_short(label))
    else:
        start = last = time.monotonic()

        def line(done: int, total: int, label: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 10 or (done == total and now - start >= 10):
                last = now
                left = f"{(now - start) / done * (total - done):.0f} s left, " if done else ""
                click.echo(f"{title}: {done}/{total}, {left}{label}", err=True)

        yield line


@contextmanager
def stoppable() -> Iterator[Any]:
    """First SIGINT or SIGTERM asks the run to stop safely, a second SIGINT ends it at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        if is_first():
            click.echo("stopping after the item at hand (Ctrl-C again to stop at once)", err=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _short(label: str) -> str:
    return label if len(label) <= 48 else "..." + label[-45:]
