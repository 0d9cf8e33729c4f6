"""`angelslim specdec decode`."""

from __future__ import annotations

from typing import Any

import click

from angelslim_core.cli.common import emit, host_of, json_option, plugins_option

from .opening import device_option


@click.command("decode")
@click.option("--model", required=True, metavar="M", help="Model folder, or a hub id when online.")
@click.option("--draft", required=True, metavar="D", help="A draft's folder, ngram, suffix, or none for plain decoding.")
@click.option("--prompt", required=True, metavar="TEXT", help="One user turn, rendered by the model's chat template.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Longest answer, tokens.")
@click.option("--k", default=5, show_default=True, type=click.IntRange(min=1), help="Tokens to propose a round, levels of a tree.")
@click.option(
    "--tree", type=(click.IntRange(min=1), click.IntRange(min=1)), metavar="TOP_K TOTAL", help="Grow trees: children of a node, and tokens to verify at most."
)
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(min=0), help="Tokens that may be sampled; 0: all.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Their share of probability.")
@click.option("--rule", default="auto", show_default=True, type=click.Choice(["auto", "ratio", "match"]), help="How sampled tokens are accepted.")
@click.option("--stop", multiple=True, metavar="STRING", help="Text that ends the answer, which keeps it; may be given again.")
@click.option(
    "--spec-exit",
    is_flag=False,
    flag_value="",
    metavar="[KEY=VALUE,..]",
    help="NOT lossless: end a thought where the draft's signals say that it has come far enough, as in confidence=.8,progress=.3,remain=200,smoothing=ewma.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of sampling.")
@device_option
@plugins_option
@json_option
def command(
    model: str, draft: str, prompt: str, max_new_tokens: int, k: int, tree: tuple[int, int] | None, temperature: float, top_k: int, top_p: float, rule: Any,
    stop: tuple[str, ...], spec_exit: str | None, seed: int, device: str, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Answer a prompt, faster by a draft and otherwise as the model alone would; with --spec-exit not as it would."""
    from angelslim_core.conversation import Conversation

    from ..drafters.autoregressive import Tree
    from ..generation import drafter_of, generate
    from ..spec_exit import SpecExit
    from ..speech import Speech
    from ..stop_strings import StopStrings
    from ..target import Target
    from .train import options_of

    exits = None if spec_exit is None else SpecExit.of(options_of(tuple(filter(None, spec_exit.split(","))), "--spec-exit", "confidence=.8"))
    talk = Conversation(model, device, host=host_of(plugins))
    target = Target(talk.model, talk.tokenizer)
    drafter = drafter_of(None if draft == "none" else draft, target, None if tree is None else Tree(k, *tree))
    encoded = talk.ask(prompt)
    stops = StopStrings(talk.tokenizer, stop) if stop else None
    speech, text, shown = Speech(talk.tokenizer), "", ""

    def show(whole: bool = False) -> None:
        nonlocal shown
        visible = text if stops is None else stops.shown(0, text, whole=whole)
        if not as_json:
            click.echo(visible[len(shown) :], nl=False)
        shown = visible

    def tell(rows: list[list[int]]) -> None:
        nonlocal text
        text += speech.add(rows[0])
        show()

    made = generate(
        target, encoded["input_ids"], drafter, max_new_tokens, temperature, top_k=top_k, top_p=top_p, k=k, rule=rule, seed=seed, tell=None if as_json else tell,
        stop_strings=stops, spec_exit=exits,
    )  # fmt: skip
    said = made.decoded.tokens[0]
    text = talk.tokenizer.decode(said, skip_special_tokens=True)
    show(whole=True)
    if as_json:
        ended = {} if stops is None else {"stop": stops.found[0]}
        emit({"model": model, "draft": draft, "text": shown, "token_ids": said, **ended, **made.stats})
        return
    click.echo()
    stats = made.stats
    total = stats["prompt_seconds"] + stats["seconds"]
    click.echo(f"{stats['tokens']} tokens, {stats['tokens'] / total:.1f} a second, {made.acceptance_length:.2f} a round", err=True)
    if not made.decoded.lossless:
        click.echo(f"NOT lossless: SpecExit has ended {'the thought' if made.decoded.exited else 'no thought'} early", err=True)
