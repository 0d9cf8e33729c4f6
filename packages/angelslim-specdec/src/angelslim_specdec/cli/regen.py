"""`angelslim specdec regen`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from angelslim_core.cli.common import emit, json_option, plugins_option, progress, stoppable

from .opening import device_option, dtype_option, open_target

if TYPE_CHECKING:
    from ..data.answers import Complete
    from ..target import Target


@click.command("regen")
@click.option("--model", required=True, metavar="M", help="The target: model folder, or a hub id when online.")
@click.option("--prompts", required=True, metavar="FILE", help="JSONL: rows with prompt, turns, conversations or messages.")
@click.option("--out", required=True, metavar="FILE", help="JSONL to write; an unfinished one is gone on with.")
@click.option("--max-new-tokens", default=2048, show_default=True, type=click.IntRange(min=1), help="Of each answer.")
@click.option("--temperature", default="0", show_default=True, metavar="T", help="One for all, or drawn for each conversation, as in 0:4,0.7:1,1:3.")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(min=1), help="Conversations for each prompt.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N prompts.")
@click.option("--drop-cut", is_flag=True, help="Leave out answers that --max-new-tokens cut; else they are kept, without an end of turn to learn.")
@click.option("--batch", type=click.IntRange(min=1), help="Answers at once; 256 on a GPU, 8 on a CPU if not given.")
@click.option("--server", metavar="URL", help="Ask a server that speaks OpenAI's protocol instead of running the target here.")
@click.option("--server-model", metavar="NAME", help="As the server calls the target; the only one it has if not given.")
@click.option("--concurrency", default=64, show_default=True, type=click.IntRange(min=1), help="Requests to the server at once.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of temperatures and of samples.")
@click.option("--replace", is_flag=True, help="Begin anew where the output exists.")
@device_option
@dtype_option
@plugins_option
@json_option
def command(
    model: str, prompts: str, out: str, max_new_tokens: int, temperature: str, samples: int, limit: int | None, drop_cut: bool, batch: int | None,
    server: str | None, server_model: str | None, concurrency: int, seed: int, replace: bool, device: str, dtype: str, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Let the target answer prompts, to train a draft on what it says.

    Every user turn is answered in order, on the history as regenerated. A server's key is read from OPENAI_API_KEY.
    """
    from dataclasses import asdict

    from angelslim_core.calibration.chats import read_prompts
    from angelslim_core.calibration.spans import Renderer
    from angelslim_core.workdir import sha256

    from ..data.answers import Assistant, Local, Server
    from ..data.regenerate import Mix, regenerate

    mix, asked = Mix.parse(temperature), read_prompts(Path(prompts))[:limit]
    settings = {"prompts": sha256(Path(prompts)), "max_new_tokens": max_new_tokens}
    assistant: Assistant
    if server is not None:
        assistant = found = Server(server, max_new_tokens, model=server_model, concurrency=concurrency, key=os.environ.get("OPENAI_API_KEY"))
        settings["model"], differs = found.model, None
    else:
        target = open_target(model, device, dtype, plugins)
        renderer = Renderer(target.tokenizer, model)
        rows = batch or (256 if target.device.type == "cuda" else 8)
        assistant = Local(renderer, _complete(target, rows, max_new_tokens), target.stop_ids)
        settings["model"], differs = target.shape.fingerprint, renderer.differs
    with stoppable() as stop_requested, progress("answering") as report:
        counts = regenerate(
            asked, assistant, Path(out), settings, mix=mix, samples=samples, seed=seed, keep_cut=not drop_cut, replace=replace,
            differs=differs or (lambda ids, text: False), progress=report, stop_requested=stop_requested,
        )  # fmt: skip
    document = {"path": out, **asdict(counts), "tokens_per_second": counts.tokens / counts.seconds if counts.seconds else 0.0}
    if as_json:
        emit(document)
        return
    click.echo(
        f"{counts.written} of {counts.prompts} conversations written, {counts.resumed} were there; {counts.cut} answers cut, {counts.empty} empty, {counts.refused} refused"
    )
    click.echo(f"{counts.tokens} tokens in {counts.seconds:.1f} s ({document['tokens_per_second']:.0f} tok/s)   {out}")


def _complete(target: Target, batch: int, max_new_tokens: int) -> Complete:
    from ..drafters.base import Warp
    from ..streaming import stream

    def run(prompts: Sequence[tuple[int, list[int]]], temperature: float, seed: int) -> Iterator[tuple[int, list[int]]]:
        capacity = max(len(ids) for _, ids in prompts) + max_new_tokens
        rows = min(batch, len(prompts))
        return stream(target, prompts, rows, capacity, max_new_tokens, warp=Warp(temperature), stops=target.stop_ids, seed=seed)

    return run
