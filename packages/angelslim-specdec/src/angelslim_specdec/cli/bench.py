"""`angelslim specdec bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from angelslim_core.cli.common import emit, json_option, plugins_option, progress, table
from angelslim_core.errors import UsageError

from .opening import device_option, dtype_option, open_target


@click.command("bench")
@click.option("--model", required=True, metavar="M", help="The target: model folder, or a hub id when online.")
@click.option("--draft", "drafts", required=True, multiple=True, metavar="D", help="Folder of a draft, or a drafter such as suffix; may be given again.")
@click.option("--prompts", "files", required=True, multiple=True, metavar="FILE", help="JSONL of prompts, of which first turns are asked; may be given again.")
@click.option("--batch", default="1", show_default=True, metavar="N,N", help="Rows at once.")
@click.option("--temperature", default="0", show_default=True, metavar="T,T", help="0 is greedy.")
@click.option("--k", default="5", show_default=True, metavar="N,N", help="Tokens a draft proposes a round.")
@click.option(
    "--tree",
    "trees",
    multiple=True,
    type=(click.IntRange(min=1), click.IntRange(min=1)),
    metavar="TOP_K TOTAL",
    help="Each draft also with trees of k levels: children of a node, and tokens to verify at most; may be given again.",
)
@click.option("--rule", default="auto", show_default=True, type=click.Choice(["auto", "ratio", "match"]), help="How sampled tokens are accepted.")
@click.option("--adaptive", is_flag=True, help="Each draft also with as many tokens proposed, up to the largest k, and verified as pay for their time.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Of each answer.")
@click.option("--samples", default=80, show_default=True, type=click.IntRange(min=1), help="Prompts of each file.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of everything, by turns; speeds are medians.")
@click.option(
    "--transformers",
    "others",
    default=8,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Prompts of each file for transformers' own generate.",
)
@device_option
@dtype_option
@click.option("--no-fused", is_flag=True, help="On a GPU, too, run the target's own modules, in many launches each.")
@click.option("--out", metavar="DIR", help="Folder for bench.json and bench.html.")
@plugins_option
@json_option
def command(
    model: str, drafts: tuple[str, ...], files: tuple[str, ...], batch: str, temperature: str, k: str, trees: tuple[tuple[int, int], ...], rule: Any, adaptive: bool,
    max_new_tokens: int, samples: int, repeats: int, others: int, device: str, dtype: str, no_fused: bool, out: str | None, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Tokens per second with a draft and without it in the same engine, and how many of its tokens are accepted.

    n-gram lookup runs beside every draft, and transformers' own `generate` at batch 1.
    """
    from angelslim_core.calibration.spans import Renderer

    from .. import bench as measuring

    sizes, lengths = _numbers(batch, "--batch", int), _numbers(k, "--k", int)
    temperatures = _numbers(temperature, "--temperature", float)
    names = [measuring.name_of(d) for d in drafts]
    stems = [Path(f).stem for f in files]
    for given, option in ((names, "--draft"), (stems, "--prompts")):
        if len(set(given)) < len(given):
            raise UsageError(764, option, f"two of {', '.join(given)} have one name, by which results go")
    chats = {stem: measuring.questions(Path(file), samples) for stem, file in zip(stems, files, strict=True)}
    target = open_target(model, device, dtype, plugins, fused=False if no_fused else None)
    renderer = Renderer(target.tokenizer, model)
    sets = {stem: renderer.prompts(rows) for stem, rows in chats.items()}
    longest = max(len(ids) for prompts in sets.values() for ids in prompts) + max_new_tokens
    if longest > target.shape.max_position_embeddings:
        raise UsageError(765, "--max-new-tokens", f"prompts and answers take {longest} positions, the target has {target.shape.max_position_embeddings}")
    makers = {name: measuring.maker(draft, target) for name, draft in zip(names, drafts, strict=True)} | {"ngram": measuring.maker("ngram", target)}
    contenders = [measuring.Contender(name, n) for name in names for n in lengths]
    contenders += [measuring.Contender(name, n, tree=tree) for name in names for n in lengths for tree in trees]
    contenders += [measuring.Contender(name, max(lengths), adaptive=True) for name in names if adaptive]
    contenders += [] if "ngram" in names else [measuring.Contender("ngram", max(lengths))]
    where = target.device.type
    document: dict[str, Any] = {
        "machine": measuring.machine(where), "model": Path(model).name, "dtype": str(target.dtype).removeprefix("torch."), "drafts": names, "rule": rule,
        "max_new_tokens": max_new_tokens, "samples": samples, "repeats": repeats, "note": measuring.NOTE, "fused_modules": target.fused,
        "transformers": [],
    }  # fmt: skip
    decode = measuring.Decoder(target, makers, longest, max_new_tokens, rule=rule)
    with progress("measuring") as report:
        document |= measuring.bench(sets, contenders, decode, sizes=sizes, temperatures=temperatures, repeats=repeats, device=where, progress=report)
        if out is not None:  # what is measured is not lost with what is slow
            _publish(document, Path(out))
        document["transformers"] = measuring.transformers_speed(target.model, sets, temperatures, max_new_tokens, others, report) if others else []
    if out is not None:
        _publish(document, Path(out))
    if as_json:
        emit(document)
    else:
        _show(document, out)


def _numbers(text: str, option: str, kind: type[int] | type[float]) -> list[Any]:
    """
    Raises:
        UsageError: no list of numbers, or one is too small.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(766, option, f"{text!r:.100} is no list of numbers", "as in 1,16") from None
    if min(found) < (1 if kind is int else 0) or len(set(found)) < len(found):
        raise UsageError(767, option, f"{text!r:.100} holds a number that is too small, or one twice")
    return found


def _publish(document: dict[str, Any], folder: Path) -> None:
    from angelslim_core.io.writer import write_json

    from ..pages import bench_page

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", {"schema_version": 1, **document})
    bench_page(document, folder / "bench.html")


def _show(document: dict[str, Any], out: str | None) -> None:
    from .. import pages

    click.echo(f"{document['model']}   {document['machine']['device']}   {document['dtype']}")
    table(pages.cells([*document["rows"], *document["means"]]), pages.ROWS)
    if document["transformers"]:
        table(pages.transformers_cells(document["transformers"]), pages.TRANSFORMERS)
    click.echo(document["note"], err=True)
    if out:
        click.echo(str(Path(out) / "bench.html"))
