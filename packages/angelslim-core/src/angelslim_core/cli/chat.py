"""`angelslim chat`."""

from __future__ import annotations

import click

from .common import host_of, plugins_option


@click.command("chat")
@click.argument("out")
@click.option("--prompt", metavar="TEXT", help="Answer this one prompt on stdout, then exit.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Longest answer, tokens.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
@plugins_option
def chat(out: str, prompt: str | None, max_new_tokens: int, temperature: float, device: str, plugins: list[str]) -> None:
    """Talk to a model folder; runtime policies of the artifact are installed."""
    from ..conversation import Conversation

    talk = Conversation(out, device, host=host_of(plugins))
    if not talk.template:
        click.echo("the model has no chat template; continuing the prompt as plain text", err=True)
    if prompt is not None:
        for piece in talk.answer(prompt, max_new_tokens, temperature):
            click.echo(piece, nl=False)
        click.echo()
        return
    click.echo("end with an empty line or Ctrl-D", err=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        for piece in talk.answer(line, max_new_tokens, temperature):
            click.echo(piece, nl=False)
        click.echo()
