"""`angelslim specdec check`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from angelslim_core.cli.common import emit, json_option, plugins_option, progress, table
from angelslim_core.errors import UsageError

from .opening import device_option, open_target

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
@click.option("--only-pair", is_flag=True, help="Leave out the small targets and the wrong builds.")
@click.option("--limit", default=16, show_default=True, type=click.IntRange(min=1), help="Prompts of that file.")
@click.option("--k", default=5, show_default=True, type=click.IntRange(min=1), help="Tokens the pair's draft proposes a round.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Of each answer of the pair.")
@click.option("--samples", default=4096, show_default=True, type=click.IntRange(min=2048), help="Texts drawn for each check of a distribution.")
@click.option("--texts", default=64, show_default=True, type=click.IntRange(min=1), help="Texts of the pair to sample by each rule.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "fp16"]), help="16 bits in which the pair is looked at for near ties.")
@click.option(
    "--tolerance",
    default=0.1,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Logits within which two tokens are a near tie, even if 16 bits round less.",
)
@device_option
@click.option("--out", metavar="DIR", help="Folder for check.json and check.html.")
@plugins_option
@json_option
def command(
    model: str | None, draft: str | None, prompts: str | None, only_pair: bool, limit: int, k: int, max_new_tokens: int, samples: int, texts: int, dtype: str, tolerance: float,
    device: str, out: str | None, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Show that drafts change no text: greedy token by token, sampled by chi-square, and that wrong builds would be noticed.

    All registered drafters decode with a small random target in fp32. With --model and --draft a real pair does, too: its texts are compared
    in fp32 token by token, and sampled ones with the target's own distribution; where texts part in 16 bits, the report says how near a
    tie it was.
    """
    given = dict(locals())
    from angelslim_core.cli.common import host_of
    from angelslim_core.io.writer import write_json

    from ..exactness.kit import run
    from ..pages import check_page, check_sections

    if (model is None) != (draft is None):
        raise UsageError(762, "--model" if draft is None else "--draft", "needs the other of --model and --draft")
    if model is None and (prompts is not None or only_pair):
        raise UsageError(763, "--prompts" if prompts is not None else "--only-pair", "is of a pair: give --model and --draft")
    host_of(plugins)
    with progress("checking") as report:
        pair = None if model is None else _pair(given, report)
        found = {"ok": True, "checks": [], "mutants": []} if only_pair else run(samples, report)
    if pair is not None:
        found |= {"ok": found["ok"] and pair["ok"], "pair": pair}
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "check.json", {"schema_version": 1, **found})
        check_page(found, folder / "check.html")
    if as_json:
        emit(found)
    else:
        for section in check_sections(found):
            click.echo(section.title)
            table([tuple(row) for row in section.rows], tuple(section.header))
            click.echo()
        click.echo("ok" if found["ok"] else "not ok")
    if not found["ok"]:
        sys.exit(8)


def _pair(given: Mapping[str, Any], report: Progress) -> dict[str, Any]:
    import torch

    from angelslim_core.calibration.spans import Renderer

    from ..bench import maker, questions
    from ..exactness.pair import check_pair

    model, draft, prompts = given["model"], given["draft"], given["prompts"]
    target = open_target(model, given["device"], plugins=given["plugins"])
    chats = questions(Path(prompts), given["limit"]) if prompts else [[{"role": "user", "content": text}] for text in _PROMPTS]
    ids = Renderer(target.tokenizer, model).prompts(chats)
    found = check_pair(
        target, lambda: maker(draft, target), ids, k=given["k"], max_new_tokens=given["max_new_tokens"], texts=given["texts"],
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[given["dtype"]], tolerance=given["tolerance"], progress=report,
    )  # fmt: skip
    return {"model": model, "draft": draft, **found}
