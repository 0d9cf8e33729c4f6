"""`angelslim specdec vocab`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from angelslim_core.cli.common import emit, json_option, plugins_option

from .opening import open_target


@click.command("vocab")
@click.option("--model", required=True, metavar="M", help="The target: model folder, or a hub id when online.")
@click.option("--data", required=True, metavar="FILE", help="JSONL of conversations, as `regen` writes it.")
@click.option("--size", required=True, type=click.IntRange(min=1), help="Tokens of the draft's vocabulary.")
@click.option("--out", required=True, metavar="FILE", help="Safetensors file to write, for `train --vocab`.")
@click.option("--length", default=2048, show_default=True, type=click.IntRange(min=8), help="Tokens of a conversation that count.")
@click.option("--turns", default="joined", show_default=True, type=click.Choice(["joined", "each"]), help="As for `train`.")
@plugins_option
@json_option
def command(model: str, data: str, size: int, out: str, length: int, turns: Literal["joined", "each"], plugins: list[str], as_json: bool) -> None:
    """Select the tokens that a draft may propose: the most frequent of the answers, and those that end them."""
    from angelslim_core.calibration.chats import read_conversations
    from angelslim_core.calibration.spans import Renderer

    from ..training.prepare import prepare
    from ..training.selection import coverage_of, select, write_selection

    target = open_target(model, "cpu", plugins=plugins)
    prepared = prepare(read_conversations(Path(data)), Renderer(target.tokenizer, model), length, turns=turns)
    vocabulary = select(prepared.rows, target, size)
    coverage = coverage_of(vocabulary, prepared.rows)
    write_selection(vocabulary, Path(out))
    document = {"path": out, "size": size, "coverage": coverage, "tokens": prepared.spoken, "conversations": prepared.documents}
    if as_json:
        emit(document)
    else:
        click.echo(f"{size} of {vocabulary.size} tokens are {100 * coverage:.2f} % of {prepared.spoken} in answers   {out}")
