"""`angelslim distill cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from angelslim_core.cli.common import emit, host_of, json_option, plugins_option, progress, size, stoppable

_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@click.command("cache")
@click.option("--model", required=True, metavar="M", help="The teacher: model folder, or a hub id when online.")
@click.option("--data", required=True, metavar="FILE", help="JSONL of conversations or text, or a text file, as a pass reads it.")
@click.option("--out", required=True, metavar="DIR", help="Folder to create, for the option `cache` of a pass.")
@click.option("--top-k", default=64, show_default=True, type=click.IntRange(min=1), help="Most likely tokens kept of each position.")
@click.option("--logp", default="fp32", show_default=True, type=click.Choice([*_DTYPES]), help="Dtype of log-probabilities.")
@click.option("--length", default=1024, show_default=True, type=click.IntRange(min=8), help="Tokens of a row, at most, as in the pass.")
@click.option("--count", default="answers", show_default=True, type=click.Choice(["answers", "all"]), help="Which tokens count, as in the pass.")
@click.option("--turns", default="joined", show_default=True, type=click.Choice(["joined", "each"]), help="As in the pass.")
@click.option("--pack/--no-pack", default=True, show_default=True, help="Documents share rows, as in the pass.")
@click.option("--held-out", default=0.02, show_default=True, type=click.FloatRange(0, 0.5), help="Share that is held out, as in the pass; kept, too.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of how rows are made: the recipe's runtime.seed.")
@click.option("--batch", type=click.IntRange(min=1), help="Rows the teacher reads at once; 8 on a GPU, 1 on a CPU if not given.")
@click.option("--shard-positions", default=1 << 16, show_default=True, type=click.IntRange(min=1), help="Positions a file, about.")
@click.option("--replace", is_flag=True, help="Replace an existing output once the new one is complete.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
@plugins_option
@json_option
def command(
    model: str, data: str, out: str, logp: str, batch: int | None, replace: bool, device: str, plugins: list[str], as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Write a teacher's distributions ahead, so that students are trained without it.

    A stopped or killed run goes on when the same command is run again.
    """
    from angelslim_core.device import pick_device
    from angelslim_core.io.hub import resolve

    from ..cache.making import CacheOptions, make_cache

    where = pick_device(device)
    chosen = CacheOptions(**options, dtype=_DTYPES[logp], batch=batch or (8 if where == "cuda" else 1))  # type: ignore[arg-type]
    with stoppable() as stop_requested, progress("caching") as report:
        made = make_cache(
            resolve(model), Path(data), Path(out), chosen, where, host=host_of(plugins), replace=replace, progress=report, stop_requested=stop_requested
        )  # fmt: skip
    nbytes = sum(shard.nbytes for shard in made.shards)
    document = {"path": out, "rows": made.rows, "positions": made.positions, "shards": len(made.shards), "bytes": nbytes, "top_k": made.top_k,
                "dtype": made.dtype, "fingerprint": made.fingerprint}  # fmt: skip
    if as_json:
        emit(document)
    else:
        click.echo(f"{made.positions} positions of {made.rows} rows in {len(made.shards)} files, {size(nbytes)}   next: a step with cache: {out}")
