"""`angelslim sparseattn accuracy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from angelslim_core.cli.common import emit, host_of, json_option, plugins_option, progress, table
from angelslim_core.errors import UsageError

from .tasks import CLASSES


@click.command("accuracy")
@click.argument("model", metavar="MODEL")
@click.option("--tasks", default=",".join(CLASSES), show_default=True, metavar="A,B", help="Tasks, named as in RULER.")
@click.option("--lengths", default="4096,8192", show_default=True, metavar="N,N", help="Tokens of prompt and answer.")
@click.option("--samples", default=50, show_default=True, type=click.IntRange(min=1), help="Prompts a task and length.")
@click.option("--policies", default="stem,xattention", show_default=True, metavar="A,B", help="Policies, with options as in stem:rate=.1:lam=0.")
@click.option("--text", metavar="FILE", help="Text that prompts hide things in, and that perplexity and KL are measured on; generated sentences if not given.")
@click.option("--windows", default=3, show_default=True, type=click.IntRange(min=1), help="Windows of --text, as long as the greatest length.")
@click.option("--able", default=0.5, show_default=True, type=click.FloatRange(0, 1), help="Policies are tried where dense attention reaches this accuracy.")
@click.option("--block", default=128, show_default=True, type=click.IntRange(min=16), help="Tokens a block.")
@click.option("--dense-layers", default="0,1", show_default=True, metavar="A,B", help="Layers that attend to everything.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the first prompt.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
@click.option("--out", metavar="DIR", help="Folder for accuracy.json.")
@plugins_option
@json_option
def accuracy_command(
    model: str, tasks: str, lengths: str, samples: int, policies: str, text: str | None, windows: int, able: float, block: int,
    dense_layers: str, seed: int, device: str, out: str | None, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Accuracy on long-context tasks, dense and by policy; with --text also perplexity and KL to dense.

    Where the dense model cannot do a task, that is said and no policy is tried.
    """
    from angelslim_core.device import pick_device
    from angelslim_core.evaluation import read_text, text_windows
    from angelslim_core.io.hub import resolve
    from angelslim_core.loading import load_model

    from . import candidates as given
    from .config import SparseAttentionConfig
    from .coupling import attachment
    from .harness import Method, accuracy, language
    from .tasks import make_task
    from .tasks.base import Filler

    wanted = tasks.split(",")
    for name in wanted:
        make_task(name)
    sizes = given.numbers(lengths, "--lengths", 1)
    if not sizes:
        raise UsageError(601, "--lengths", "names no length")
    common: Any = {"block": block, "min_len": 0, "dense_layers": tuple(given.numbers(dense_layers, "--dense-layers"))}
    methods = [Method(c.label, SparseAttentionConfig(policy=c.name, options=dict(c.options), **common)) for c in given.candidates(policies)]
    filler = Filler(None if text is None else read_text(Path(text)))
    loaded = load_model(resolve(model), pick_device(device), host=host_of(plugins))
    if (attached := attachment(loaded.model)) is not None:  # an artifact with a policy
        attached.detach()
    if loaded.tokenizer is None:
        raise UsageError(600, model, "has no tokenizer, so no prompt can be made")
    ids = None if text is None else text_windows(loaded.tokenizer, model, text, windows, max(sizes))
    with progress("answering") as report:
        rows = accuracy(loaded.model, loaded.tokenizer, methods, wanted, sizes, samples=samples, filler=filler, seed=seed, able=able, progress=report)
    with progress("reading") as report:
        read = [] if ids is None else language(loaded.model, methods, ids, report)
    document = {"model": Path(model).name, "seed": seed, "able": able, "block": block, "rows": rows, "language": read}
    if out is not None:
        from angelslim_core.io.writer import write_json

        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "accuracy.json", {"schema_version": 1, **document})
    if as_json:
        emit(document)
    else:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    rows = document["rows"]
    for row in rows:
        if row.get("able") is False:
            click.echo(f"dense attention reaches {row['accuracy']:.2f} in {row['task']} at {row['length']}: no policy was tried there", err=True)
    cells = [
        (
            row["method"], row["task"], str(row["length"]), str(row["samples"]), f"{100 * row['accuracy']:.1f}",
            "" if row["stderr"] is None else f"{100 * row['stderr']:.1f}", _density(row),
        )
        for row in rows
    ]  # fmt: skip
    table(cells, ("policy", "task", "tokens", "samples", "accuracy %", "+-", "density"))
    if document["language"]:
        read = [
            (
                row["method"],
                f"{row['perplexity']:.3f}",
                *((f"{row['kl']:.4f}", f"{100 * row['top1_agreement']:.1f}", _density(row)) if "kl" in row else ("",) * 3),
            )
            for row in document["language"]
        ]
        table(read, ("policy", "perplexity", "KL to dense", "same first choice %", "density"))


def _density(row: dict[str, Any]) -> str:
    return "dense" if row["density"] is None else f"{row['density']:.3f}"
