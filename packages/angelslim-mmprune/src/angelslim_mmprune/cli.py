"""`angelslim mmprune ...`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from angelslim_core.cli.common import emit, host_of, json_option, plugins_option, progress, table
from angelslim_core.errors import UsageError


@click.command("bench")
@click.option("--lengths", metavar="N,N", help="Tokens of an image or clip; 576,4096 on a GPU and 144,576 on a CPU if not given.")
@click.option("--strategies", metavar="A,B", help="Strategies, with options as in divprune:keep_ratio=.1; all, with random scorers, if not given.")
@click.option("--keep-ratio", default=0.25, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Of strategies that name no budget.")
@click.option("--model", metavar="M", help="Model folder, or a hub id when online: also its time to the first token, with random media.")
@click.option("--width", type=click.IntRange(min=1, max=65536), help="Of features without --model; 3584 on a GPU and 512 on a CPU if not given.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1, max=4096), help="Images at once where strategies run by themselves.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
@click.option("--repeats", type=click.IntRange(min=1), help="Calls timed; 20 on a GPU, 3 on a CPU if not given.")
@click.option("--out", metavar="DIR", help="Folder for bench.json and bench.html.")
@plugins_option
@json_option
def bench_command(
    lengths: str | None, strategies: str | None, keep_ratio: float, model: str | None, width: int | None, batch: int, device: str, repeats: int | None,
    out: str | None, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Time that strategies take to choose tokens, over random features.

    With --model also the time to the first token and the peak of memory, with and without them. Random features tell speed, not quality.
    """
    from angelslim_core.device import pick_device

    from .bench import first_token, machine, selection
    from .candidates import candidates, every, numbers
    from .models import towers
    from .scorer import Scorer, save_scorer

    where = pick_device(device)
    on_gpu = where == "cuda"
    sizes = numbers(lengths or ("576,4096" if on_gpu else "144,576"), "--lengths")
    if model is not None and width is not None:
        raise click.UsageError("--width is of random features alone; with --model they have the model's")
    chosen = candidates(strategies, keep_ratio) if strategies is not None else []
    repeats = repeats or (20 if on_gpu else 3)
    with progress("timing") as report, TemporaryDirectory() as temporary:
        document: dict[str, Any] = {"machine": machine(where), "repeats": repeats, "ttft": [], "left_out": []}
        if model is not None:
            loaded, folder = _opened(model, where, plugins)
            language: Any = towers(loaded.model).language
            width = language.config.hidden_size
        width = int(width or (3584 if on_gpu else 512))
        document["inputs"] = f"random features of width {width}, {'BF16' if on_gpu else 'FP32'}, batch {batch}"
        if strategies is None:
            save_scorer(Scorer(width, max(1, width // 2)), Path(temporary) / "scorer")
            chosen = every(keep_ratio, Path(temporary) / "scorer")
            document["inputs"] += ", random scorers"
        document["rows"] = selection(sizes, chosen, width=width, batch=batch, device=where, repeats=repeats, progress=report)
        if model is not None:
            document["inputs"] += f"; {folder.name} with random media"
            document["ttft"], unfit = first_token(loaded.model, sizes, chosen, device=where, repeats=repeats, progress=report)
            if strategies is not None and unfit:
                raise UsageError(887, "--strategies", unfit[0])
            document["left_out"] = unfit
    if out is not None:
        from angelslim_core.io.writer import write_json

        from .pages import bench_page

        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "bench.json", {"schema_version": 1, **document})
        bench_page(document, Path(out) / "bench.html")
    if as_json:
        emit(document)
    else:
        _show_times(document, out)


def _opened(model: str, device: str, plugins: list[str]) -> tuple[Any, Path]:
    """A model that drops nothing by itself, even if its folder has a policy, and its folder."""
    from angelslim_core.io.hub import resolve
    from angelslim_core.loading import load_model

    from .installed import attachment

    folder = resolve(model)
    loaded = load_model(folder, device, host=host_of(plugins))
    while (found := attachment(loaded.model)) is not None:
        found.remove()
    return loaded, folder


def _show_times(document: dict[str, Any], out: str | None) -> None:
    from . import pages

    click.echo(f"{document['inputs']}   {document['machine']['device']}")
    table(pages.selection_cells(document["rows"]), pages.SELECTION)
    if document["ttft"]:
        table(pages.first_token_cells(document["ttft"]), pages.FIRST_TOKEN)
    for line in document["left_out"]:
        click.echo(f"left out: {line}", err=True)
    if out:
        click.echo(str(Path(out) / "bench.html"))


@click.command("show")
@click.option("--model", required=True, metavar="M", help="Model folder, or a hub id when online.")
@click.option("--image", metavar="FILE", help="PNG, JPEG, WebP or BMP file.")
@click.option("--audio", metavar="FILE", help="WAV file of 16-bit integers; of a long one as much as the model takes at once.")
@click.option("--strategy", required=True, metavar="NAME", help="With options as in divprune:keep_ratio=.1; a quarter is kept if no budget is named.")
@click.option("--prompt", default="Describe this.", show_default=True, metavar="TEXT", help="What is asked, behind the image or clip.")
@click.option("--out", required=True, metavar="DIR", help="Folder for show.html and show.json.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
@plugins_option
@json_option
def show_command(
    model: str, image: str | None, audio: str | None, strategy: str, prompt: str, out: str, device: str, plugins: list[str], as_json: bool
) -> None:
    """Draw the tokens that a strategy keeps over an image, or over a waveform."""
    from angelslim_core.device import pick_device
    from angelslim_core.io.writer import write_json
    from angelslim_core.report import Section, need_matplotlib, write_page

    from .candidates import candidates
    from .show import shown

    if (image is None) == (audio is None):
        raise UsageError(898, "show", "needs --image or --audio, and not both")
    chosen = candidates(strategy, 0.25)
    if len(chosen) > 1:
        raise UsageError(899, "--strategy", "takes one strategy")
    need_matplotlib()
    loaded, folder = _opened(model, pick_device(device), plugins)
    found = shown(loaded, folder, chosen[0].strategy, prompt, image and Path(image), audio and Path(audio))  # type: ignore[arg-type]
    pictures = found.pop("pictures")
    document = {"model": folder.name, "strategy": chosen[0].label, "file": Path(image or audio or "").name, "prompt": prompt, **found}
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "show.json", {"schema_version": 1, **document})
    note = f"{document['file']} read by {folder.name}: {prompt}"
    write_page(Path(out) / "show.html", f"Tokens kept by {chosen[0].label}", note, [Section(title, "", svg) for title, svg in pictures])
    if as_json:
        emit(document)
    else:
        for stage in found["stages"]:
            click.echo(
                f"{'before the language model' if stage['layer'] is None else 'behind layer ' + str(stage['layer'])}: {stage['after']} of {found['tokens']}"
            )
        click.echo(str(Path(out) / "show.html"))
