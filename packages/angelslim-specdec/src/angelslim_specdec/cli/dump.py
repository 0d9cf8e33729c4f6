"""`angelslim specdec dump`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from angelslim_core.cli.common import emit, json_option, plugins_option, progress, size, stoppable

from .opening import device_option, dtype_option, open_target


@click.command("dump")
@click.option("--model", required=True, metavar="M", help="The target: model folder, or a hub id when online.")
@click.option("--data", required=True, metavar="FILE", help="JSONL of conversations that the target answered, as `regen` writes it.")
@click.option("--draft", required=True, metavar="NAME", help="Kind of draft, which says what layers it reads.")
@click.option("--out", required=True, metavar="DIR", help="Folder to create, for `train --features`.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the draft, as for `train`; may be repeated.")
@click.option("--length", default=2048, show_default=True, type=click.IntRange(min=8), help="Tokens of a packed row, at most; longer conversations are cut.")
@click.option("--batch", type=click.IntRange(min=1), help="Rows the target reads at once; 8 on a GPU, 1 on a CPU if not given.")
@click.option("--shard-tokens", default=1 << 16, show_default=True, type=click.IntRange(min=1), help="Tokens a file, unless one row is longer.")
@click.option("--turns", default="joined", show_default=True, type=click.Choice(["joined", "each"]), help="As for `train`.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of how conversations are packed.")
@click.option("--replace", is_flag=True, help="Replace an existing output once the new one is complete.")
@device_option
@dtype_option
@plugins_option
@json_option
def command(
    model: str, data: str, draft: str, out: str, settings: tuple[str, ...], length: int, batch: int | None, shard_tokens: int,
    turns: Literal["joined", "each"], seed: int, replace: bool, device: str, dtype: str, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Write what the target computes while it reads conversations, so that drafts can be trained without it.

    A token takes (layers + 1) x hidden size numbers. A stopped or killed run goes on when the same command is run again.
    """
    from angelslim_core.calibration.chats import read_conversations
    from angelslim_core.calibration.spans import Renderer
    from angelslim_core.io.checkpoint import dtype_name
    from angelslim_core.workdir import sha256

    from ..data.shards import Manifest
    from ..registry import draft_named
    from ..training.dump import dump
    from ..training.prepare import prepare
    from .train import options_of

    target = open_target(model, device, dtype, plugins)
    layers = draft_named(draft).from_target(target.shape, **options_of(settings)).config.aux_hidden_state_layer_ids
    prepared = prepare(read_conversations(Path(data)), Renderer(target.tokenizer, model), length, turns=turns, seed=seed)
    manifest = Manifest(
        fingerprint=target.shape.fingerprint, layer_ids=layers, hidden_size=target.shape.hidden_size, dtype=dtype_name(target.dtype),
        template=prepared.template, data=sha256(Path(data)), length=length, turns=turns, seed=seed,
    )  # fmt: skip
    with stoppable() as stop_requested, progress("dumping") as report:
        rows = batch or (8 if target.device.type == "cuda" else 1)
        made = dump(
            target, prepared.rows, manifest, Path(out), batch=rows, shard_tokens=shard_tokens, replace=replace, progress=report, stop_requested=stop_requested
        )  # fmt: skip
    nbytes = sum(shard.nbytes for shard in made.shards)
    document = {
        "path": out, "tokens": made.tokens, "rows": made.rows, "shards": len(made.shards), "bytes": nbytes, "layer_ids": list(made.layer_ids), "dtype": made.dtype,
        "conversations": prepared.documents, "dropped": prepared.dropped,
    }  # fmt: skip
    if as_json:
        emit(document)
    else:
        click.echo(
            f"{made.tokens} tokens in {len(made.shards)} files, {size(nbytes)}   next: angelslim specdec train --model {model} --features {out} --draft {draft} --out DIR"
        )
