"""`angelslim sparseattn ...`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from angelslim_core.cli.common import emit, host_of, json_option, plugins_option, progress, table
from angelslim_core.errors import UsageError

# of equals the first is taken; shares near 1 fall to 2 tau - 1, as they were measured
_BY_SHARE = ",".join(
    f"stem:score=mass:tau={tau}:alpha={alpha}:n_init=128:n_local=256"
    for tau, alpha in ((".8", ".9"), (".9", ".9"), (".95", ".9"), (".98", ".96"), (".995", ".99"))
)
_TRIED = (
    f"{_BY_SHARE},a_shape:n_local=896,a_shape:n_local=1920,stem:rate=.05,stem:rate=.1,stem:rate=.2,stem:rate=.4,"
    "xattention:tau=.8,xattention:tau=.9,xattention:tau=.95,xattention:tau=.98,flashprefill"
)
_POLICIES = "stem,stem:rate=.1,xattention,flashprefill,minference"


def _where_and_how(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of both commands."""
    block = click.option("--block", default=128, show_default=True, type=click.IntRange(min=16), help="Tokens a block.")
    executor = click.option(
        "--executor", default="auto", show_default=True,
        help="What attends to the blocks; auto: the first of triton, flex, flash that takes the call, on a CPU the reference.",
    )  # fmt: skip
    device = click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
    return block(executor(device(command)))


@click.command("bench")
@click.option("--model", metavar="M", help="Model folder, or a hub id when online: its queries, keys and values over --text instead of random ones.")
@click.option("--text", metavar="FILE", help="Text that the model reads.")
@click.option("--layers", metavar="A,B", help="Layers of the model to measure; four, evenly spaced, if not given.")
@click.option("--lengths", metavar="N,N", help="Tokens; 8192,32768 on a GPU and 1024,2048 on a CPU if not given.")
@click.option("--policies", default=_POLICIES, show_default=True, metavar="A,B", help="Policies, with options as in stem:rate=.1:lam=0.")
@click.option("--heads", type=click.IntRange(min=1), help="Query heads of random input; 32 if not given.")
@click.option("--kv-heads", type=click.IntRange(min=1), help="KV heads of random input; 8 if not given.")
@click.option("--head-dim", type=click.IntRange(min=1), help="Width of a head of random input; 128 if not given.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Of random input; bf16 if not given.")
@_where_and_how
@click.option("--repeats", type=click.IntRange(min=1), help="Calls timed; 30 on a GPU, 3 on a CPU and with --ttft if not given.")
@click.option("--ttft", is_flag=True, help="Time to the first token of the whole model instead of attention alone.")
@click.option("--out", metavar="DIR", help="Folder for bench.json and bench.html.")
@plugins_option
@json_option
def bench_command(
    model: str | None, text: str | None, layers: str | None, lengths: str | None, policies: str, heads: int | None, kv_heads: int | None,
    head_dim: int | None, dtype: str | None, block: int, executor: str, device: str, repeats: int | None, ttft: bool, out: str | None,
    plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Time and recall of policies beside dense attention.

    Density, selection and attention in ms, speedup over dense attention (cuDNN, FlashAttention and, where installed, FA4), recall (the
    share of dense attention's weight that is kept) and the output's error, a row a length and policy.
    """
    from angelslim_core.device import pick_device

    from . import candidates as given
    from .bench import RANDOM, bench, first_token, machine

    chosen, where = given.candidates(policies), pick_device(device)
    sizes = given.numbers(lengths or ("8192,32768" if where == "cuda" else "1024,2048"), "--lengths", 1)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    named = [f"--{key.replace('_', '-')}" for key, value in shape.items() if value is not None]
    if model is None and (ttft or text or layers):
        raise UsageError(587, "--ttft" if ttft else "--text" if text else "--layers", "needs --model")
    if model is not None and (named or text is None):
        raise UsageError(588, named[0] if named else "--model", "is of random input, not of a model" if named else "needs --text")
    if ttft and layers:
        raise UsageError(589, "--layers", "chooses layers of attention alone; --ttft runs the whole model")
    repeats = repeats or (30 if where == "cuda" and not ttft else 3)
    document: dict[str, Any] = {"machine": machine(where), "repeats": repeats, "block": block, "dense": [], "rows": [], "ttft": []}
    with progress("timing") as report:
        if model is None:
            wanted: Any = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bf16"} | {k: v for k, v in shape.items() if v is not None}
            document |= {"inputs": f"random, {', '.join(f'{k} {v}' for k, v in wanted.items())}", "note": RANDOM}
            document |= bench(
                lambda length: [given.drawn(length, device=where, **wanted)], sizes, chosen,
                executor=executor, device=where, repeats=repeats, block=block, progress=report,
            )  # fmt: skip
        else:
            loaded = given.Reader(model, str(text), where, host_of(plugins))
            document |= {"inputs": f"{loaded.name} reading {Path(str(text)).name}", "note": ""}
            options: Any = {"executor": executor, "device": where, "repeats": repeats, "block": block, "progress": report}
            loaded.ids(max(sizes))  # a text that is too short is no reason to measure half
            if ttft:
                document["ttft"] = first_token(loaded.model, loaded.ids, sizes, chosen, **options)
            else:
                of = loaded.layers(layers)
                document |= bench(lambda length: given.real(loaded.model, loaded.ids(length), of), sizes, chosen, layers=len(of), **options)
    _publish(document, out)
    if as_json:
        emit(document)
    else:
        _show(document, out)


def _publish(document: dict[str, Any], out: str | None) -> None:
    if out is None:
        return
    from angelslim_core.io.writer import write_json

    from .pages import bench_page

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", {"schema_version": 1, **document})
    bench_page(document, folder / "bench.html")


def _show(document: dict[str, Any], out: str | None) -> None:
    from . import pages

    click.echo(f"{document['inputs']}   {document['machine']['device']}")
    if document["note"]:
        click.echo(f"note: {document['note']}", err=True)
    if document["rows"]:
        table(pages.dense_cells(document["dense"]), pages.DENSE)
        header, cells = pages.attention_table(document["rows"])
        table(cells, header)
    if document["ttft"]:
        table(pages.first_token_cells(document["ttft"]), pages.FIRST_TOKEN)
    if out:
        click.echo(str(Path(out) / "bench.html"))


@click.command("choose")
@click.argument("model")
@click.option("--text", required=True, metavar="FILE", help="Text such as the model will read.")
@click.option("--out", required=True, metavar="F", help="File to write: .json is a SparseAttentionConfig, .yaml a recipe for `angelslim run`.")
@click.option("--recall", default=0.95, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Share of dense attention's weight to keep.")
@click.option("--length", default=8192, show_default=True, type=click.IntRange(min=2), help="Tokens the model reads at once.")
@click.option("--windows", default=1, show_default=True, type=click.IntRange(min=1), help="Consecutive pieces of that length, at most.")
@click.option("--policies", default=_TRIED, show_default=True, metavar="A,B", help="Policies to choose from, with options as in stem:rate=.1:lam=0.")
@click.option("--by", default="head", show_default=True, type=click.Choice(["head", "layer"]), help="A policy for each head, or one for all heads of a layer.")
@click.option("--dense-layers", default="0,1", show_default=True, metavar="A,B", help="Layers that stay dense, unmeasured; may be empty.")
@click.option("--min-len", type=click.IntRange(min=0), help="Shorter sequences attend to everything; --length, and at most 8192, if not given.")
@_where_and_how
@click.option("--report", "page", metavar="FILE", help="HTML file: recall over density of every policy.")
@plugins_option
@json_option
def choose_command(
    model: str, text: str, out: str, recall: float, length: int, windows: int, policies: str, by: Literal["head", "layer"], dense_layers: str,
    min_len: int | None, block: int, executor: str, device: str, page: str | None, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Choose the cheapest policy of each head whose recall on a text suffices.

    Recall is measured on every layer's real queries, keys and values, and is exact. A head that no policy serves stays dense.
    """
    import yaml

    from angelslim_core.device import pick_device
    from angelslim_core.io.writer import write_json, write_text

    from . import candidates as given
    from .choose import choose, recipe_of
    from .pages import CHOICES, choice_cells, choice_page

    target = Path(out)
    if target.suffix not in (".json", ".yaml", ".yml"):
        raise UsageError(580, out, "is neither .json nor .yaml", "a configuration is JSON, a recipe YAML")
    chosen = given.candidates(policies)
    reader = given.Reader(model, text, pick_device(device), host_of(plugins))
    dense = given.numbers(dense_layers, "--dense-layers")
    ids = reader.windows(windows, length)
    with progress("measuring") as report:
        config, found = choose(
            reader.model, ids, reader.attention_layers(dense), chosen, target=recall, dense_layers=dense, by=by, min_len=min(length, 8192) if min_len is None else min_len,
            block=block, executor=executor, progress=report,
        )  # fmt: skip
    if target.suffix == ".json":
        write_json(target, config.model_dump(mode="json"))
    else:
        write_text(target, yaml.safe_dump(recipe_of(config), sort_keys=False))
    document: dict[str, Any] = {
        "path": out, "config": config.model_dump(mode="json"), "model": reader.name, "target": recall, "by": by, "length": length, "tokens": ids.numel(), **found,
    }  # fmt: skip
    if page is not None:
        choice_page(document, Path(page))
    if as_json:
        emit(document)
        return
    table(choice_cells(found["candidates"]), CHOICES)
    click.echo(f"{found['dense_heads']} heads of measured layers stay dense; layers {', '.join(map(str, config.dense_layers)) or 'none'} are dense")
    click.echo(f"density {found['density']:.3f}   recall {found['recall']:.4f}, {found['recall_worst']:.4f} in the worst head   {out}")
