"""`angelslim eval`."""

from __future__ import annotations

import click

from .common import emit, host_of, json_option, plugins_option, progress


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
    spread = f" +- {found['perplexity_stderr']:.3f}" if found["perplexity_stderr"] is not None else ""
    click.echo(f"perplexity {found['perplexity']:.3f}{spread}, {found['tokens']} tokens, {found['windows']} x {found['length']}, {found['backend']}")
    if base:
        spread = f" +- {found['kl_stderr']:.4f}" if found["kl_stderr"] is not None else ""
        click.echo(
            f"base {found['base_perplexity']:.3f}, KL(base, out) {found['kl']:.4f}{spread} nats per token, same first choice {100 * found['top1_agreement']:.2f} %"
        )
