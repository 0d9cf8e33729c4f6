"""`angelslim eval`."""

from __future__ import annotations

import click

from .common import emit, host_of, json_option, plugins_option, progress, show_evaluation


@click.command("eval")
@click.argument("out")
@click.option("--base", metavar="M", help="The model to compare with.")
@click.option("--text", required=True, metavar="FILE", help="Text to score.")
@click.option("--windows", default=32, show_default=True, type=click.IntRange(min=1), help="Consecutive windows from the start of the text.")
@click.option("--length", default=1024, show_default=True, type=click.IntRange(min=2), help="Tokens a window.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
@plugins_option
@json_option
def eval_(out: str, base: str | None, text: str, windows: int, length: int, device: str, plugins: list[str], as_json: bool) -> None:
    """Perplexity of a folder on a text and, with --base, its KL and top-1 agreement to the base."""
    from ..evaluation import evaluate

    with progress("evaluating") as report:
        found = evaluate(out, base, text=text, windows=windows, length=length, device=device, progress=report, host=host_of(plugins))
    if as_json:
        emit(found)
        return
    show_evaluation(found)
