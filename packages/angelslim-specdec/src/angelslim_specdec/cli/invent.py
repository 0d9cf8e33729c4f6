"""`angelslim specdec invent`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count as numbers
from pathlib import Path
from typing import TYPE_CHECKING

import click

from angelslim_core.cli.common import emit, json_option, plugins_option, progress, stoppable
from angelslim_core.errors import ModelError, UsageError

from .opening import device_option, dtype_option, open_target

if TYPE_CHECKING:
    from ..target import Target

_PREFIX = (16, 64)


@click.command("invent")
@click.option("--model", required=True, metavar="M", help="The target: model folder, or a hub id when online.")
@click.option("--count", required=True, type=click.IntRange(min=1), metavar="N", help="Prompts, or rows of text, to write.")
@click.option("--text", metavar="FILE", help="Go on with pieces of this text instead (UTF-8, or JSONL of {text}), which writes rows of text.")
@click.option("--prefix", nargs=2, type=click.IntRange(min=4), metavar="LEAST MOST", help=f"Tokens of a piece. Default {_PREFIX[0]} {_PREFIX[1]}.")
@click.option("--out", required=True, metavar="FILE", help="JSONL to write, for `regen --prompts` or to train on; an unfinished one is gone on with.")
@click.option(
    "--max-new-tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Of a prompt, else it is dropped, or of what follows a piece."
)
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0), help="To sample them with; 0 with --text only.")
@click.option("--batch", type=click.IntRange(min=1), help="Prompts at once; 256 on a GPU, 8 on a CPU if not given.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the samples, and of which pieces.")
@click.option("--replace", is_flag=True, help="Begin anew where the output exists.")
@device_option
@dtype_option
@plugins_option
@json_option
def command(
    model: str, count: int, text: str | None, prefix: tuple[int, int] | None, out: str, max_new_tokens: int, temperature: float, batch: int | None, seed: int,
    replace: bool, device: str, dtype: str, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Let the target make up prompts: it is shown the opening of a user's turn and says what users say.

    Where prompts lack, these are of the kind it was trained on; `regen` then answers them. With --text it is shown, without a
    chat template, how pieces of that text begin and goes on: text of that kind, of the target's own.
    """
    from dataclasses import asdict

    from angelslim_core.calibration.spans import Renderer
    from angelslim_core.workdir import sha256

    from ..data.continued import Passages, continue_passages, read_passages
    from ..data.invent import invent, opening

    if text is None and prefix is not None:
        raise UsageError(1026, "--prefix", "is of pieces of a text", "give --text")
    if text is None and temperature == 0:
        raise UsageError(1027, "--temperature", "0 would make up the same prompt each time", "give a greater one")
    least, most = prefix or _PREFIX
    if least > most:
        raise UsageError(1028, "--prefix", f"{least} tokens at least are more than {most} at most")
    texts = read_passages(Path(text)) if text is not None else []
    target = open_target(model, device, dtype, plugins)
    run = _Attempts(target, batch or (256 if target.device.type == "cuda" else 8), max_new_tokens, temperature, seed)
    settings = {"model": target.shape.fingerprint, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if text is None:
        renderer = Renderer(target.tokenizer, model)
        begun, title = opening(renderer), "inventing"
        settings |= {"text": None, "prefix": None}
        write = partial(invent, renderer, lambda start, first: run(lambda number: start, len(begun), target.stop_ids, first), target.stop_ids)
    else:
        if target.tokenizer is None:
            raise ModelError(1029, model, "has no tokenizer, which text needs")
        passages = Passages(texts, target.tokenizer, least, most, seed, f"--text {text}")
        longest, stops, title = len(passages.leading) + most, tuple(target.shape.special_ids), "continuing"
        if longest + max_new_tokens > (positions := target.shape.max_position_embeddings):
            what = f"pieces of up to {longest} tokens and {max_new_tokens} behind them take more than the target's {positions} positions"
            raise UsageError(1024, "--prefix", what, "give a lower one, or a lower --max-new-tokens")
        settings |= {"text": sha256(Path(text)), "prefix": [least, most]}
        attempts = partial(run, lambda number: passages(number).ids, longest, stops)
        write = partial(continue_passages, passages, target.tokenizer, attempts, stops)
    with stoppable() as stop_requested, progress(title) as report:
        found = write(count, Path(out), settings, replace=replace, progress=report, stop_requested=stop_requested)
    if as_json:
        emit({"path": out, **asdict(found)})
        return
    what, then = ("prompts", f"angelslim specdec regen --model {model} --prompts {out}") if text is None else ("texts", "train on it with count: all")
    click.echo(f"{found.written} {what} written, {found.resumed} were there; {found.cut} cut, {found.repeated} repeated, {found.empty} empty")
    click.echo(f"{found.tokens} tokens in {found.seconds:.1f} s   {out}   next: {then}")


@dataclass(frozen=True)
class _Attempts:
    """Runs the target on one beginning after another.

    Args:
        rows: at once.
    """

    target: Target
    rows: int
    max_new_tokens: int
    temperature: float
    seed: int

    def __call__(self, shown: Callable[[int], list[int]], longest: int, stops: tuple[int, ...], first: int) -> Iterator[tuple[int, list[int]]]:
        """Number of an attempt, from `first` on and without end, and its tokens; what is shown has `longest` at most."""
        from ..data.regenerate import seed_of
        from ..drafters.base import Warp
        from ..streaming import stream

        requests = ((number, shown(number)) for number in numbers(first))
        capacity, seed = longest + self.max_new_tokens, seed_of(self.seed) + first
        return stream(self.target, requests, self.rows, capacity, self.max_new_tokens, warp=Warp(self.temperature), stops=stops, seed=seed)
