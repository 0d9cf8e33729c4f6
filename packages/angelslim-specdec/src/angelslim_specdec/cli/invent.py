"""`angelslim specdec invent`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from angelslim_core.cli.common import emit, json_option, plugins_option, progress, stoppable

from .opening import device_option, dtype_option, open_target


@click.command("invent")
@click.option("--model", required=True, metavar="M", help="The target: model folder, or a hub id when online.")
@click.option("--count", required=True, type=click.IntRange(min=1), metavar="N", help="Prompts to write.")
@click.option("--out", required=True, metavar="FILE", help="JSONL to write, for `regen --prompts`; an unfinished one is gone on with.")
@click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Of a prompt; longer ones are dropped.")
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="To sample them with.")
@click.option("--batch", type=click.IntRange(min=1), help="Prompts at once; 256 on a GPU, 8 on a CPU if not given.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the samples.")
@click.option("--replace", is_flag=True, help="Begin anew where the output exists.")
@device_option
@dtype_option
@plugins_option
@json_option
def command(
    model: str, count: int, out: str, max_new_tokens: int, temperature: float, batch: int | None, seed: int, replace: bool, device: str, dtype: str,
    plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Let the target make up prompts: it is shown the opening of a user's turn and says what users say.

    Where prompts lack, these are of the kind it was trained on; `regen` then answers them.
    """
    from dataclasses import asdict

    from angelslim_core.calibration.spans import Renderer

    from ..data.invent import invent
    from ..data.regenerate import seed_of
    from ..drafters.base import Warp
    from ..streaming import stream

    target = open_target(model, device, dtype, plugins)
    rows = batch or (256 if target.device.type == "cuda" else 8)

    def tokens(opening: list[int], first: int) -> Iterator[tuple[int, list[int]]]:
        from itertools import count as numbers

        requests = ((number, opening) for number in numbers(first))
        capacity = len(opening) + max_new_tokens
        return stream(target, requests, rows, capacity, max_new_tokens, warp=Warp(temperature), stops=target.stop_ids, seed=seed_of(seed) + first)

    settings = {"model": target.shape.fingerprint, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with stoppable() as stop_requested, progress("inventing") as report:
        found = invent(
            Renderer(target.tokenizer, model),
            tokens,
            target.stop_ids,
            count,
            Path(out),
            settings,
            replace=replace,
            progress=report,
            stop_requested=stop_requested,
        )
    if as_json:
        emit({"path": out, **asdict(found)})
        return
    click.echo(f"{found.written} prompts written, {found.resumed} were there; {found.cut} cut, {found.repeated} repeated, {found.empty} empty")
    click.echo(f"{found.tokens} tokens in {found.seconds:.1f} s   {out}   next: angelslim specdec regen --model {model} --prompts {out}")
