"""`angelslim specdec check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from angelslim_core.cli.common import emit, json_option, plugins_option, progress, table
from angelslim_core.errors import UsageError

from .opening import DTYPES, open_target

if TYPE_CHECKING:
    from angelslim_core.context import Progress

_PROMPTS = (
    "What is the capital of France, and what is it known for?", "Write a Python function that reverses a string.",
    "A train goes 60 miles an hour for 2.5 hours. How far does it go?", "Explain photosynthesis to a child in three sentences.",
)  # fmt: skip


@click.command("check")
@click.option("--model", metavar="M", help="Also check a real target, with --draft: model folder, or a hub id when online.")
@click.option("--draft", metavar="D", help="Folder of a draft, or a drafter such as ngram.")
@click.option("--prompts", metavar="FILE", help="JSONL of prompts for the pair; four of the kit's own if not given.")
@click.option("--limit", default=16, show_default=True, type=click.IntRange(min=1), help="Prompts of that file.")
@click.option("--k", default=5, show_default=True, type=click.IntRange(min=1), help="Tokens the pair's draft proposes a round.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Of each answer of the pair.")
@click.option("--samples", default=4096, show_default=True, type=click.IntRange(min=2048), help="Texts drawn for each check of a distribution.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where the pair runs; the kit's own target is on the CPU.")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(DTYPES), help="To run the pair's target in.")
@plugins_option
@json_option
def command(
    model: str | None, draft: str | None, prompts: str | None, limit: int, k: int, max_new_tokens: int, samples: int, device: str, dtype: str,
    plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Show that drafts change no text: greedy token by token, sampled by chi-square, and that wrong builds would be noticed.

    All registered drafters decode with a small random target in fp32. With --model and --draft a real pair decodes too; where its texts
    part in 16 bits, the report says how near a tie it was.
    """
    from angelslim_core.cli.common import host_of

    from ..exactness.kit import run

    if (model is None) != (draft is None):
        raise UsageError(762, "--model" if draft is None else "--draft", "needs the other of --model and --draft")
    if model is None and prompts is not None:
        raise UsageError(763, "--prompts", "is of a pair: give --model and --draft")
    host_of(plugins)
    with progress("checking") as report:
        pair = None if model is None or draft is None else _pair(model, draft, prompts, limit, k, max_new_tokens, device, dtype, plugins, report)
        found = run(samples, report)
    if pair is not None:
        found["checks"].insert(0, {"name": f"{draft} with {model}", "ok": pair["ok"], "detail": pair["detail"]})
        found |= {"ok": found["ok"] and pair["ok"], "near_ties": pair}
    if as_json:
        emit(found)
    else:
        table([(c["name"], "ok" if c["ok"] else "NOT OK", c["detail"]) for c in found["checks"]], ("check", "", ""))
        table([(m["name"], "caught" if m["caught"] else "MISSED", f"{m['p']:.2g}") for m in found["mutants"]], ("wrong build", "", "p"))
        click.echo("ok" if found["ok"] else "not ok")
    if not found["ok"]:
        sys.exit(8)


def _pair(
    model: str, draft: str, prompts: str | None, limit: int, k: int, max_new_tokens: int, device: str, dtype: str, plugins: list[str], report: Progress
) -> dict[str, Any]:  # fmt: skip
    from ..bench import maker, questions
    from ..data.spans import Renderer
    from ..exactness.pair import check_pair

    target = open_target(model, device, dtype, plugins)
    chats = questions(Path(prompts), limit) if prompts else [[{"role": "user", "content": text}] for text in _PROMPTS]
    ids = Renderer(target.tokenizer, model).prompts(chats)
    return check_pair(target, maker(draft, target), ids, k=k, max_new_tokens=max_new_tokens, progress=report)
