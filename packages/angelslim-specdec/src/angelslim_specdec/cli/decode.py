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
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of sampling.")
@device_option
@plugins_option
@json_option
def command(
    model: str, draft: str, prompt: str, max_new_tokens: int, k: int, tree: tuple[int, int] | None, temperature: float, top_k: int, top_p: float, rule: Any,
    seed: int, device: str, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Answer a prompt, faster by a draft and otherwise as the model alone would."""
    from angelslim_core.conversation import Conversation

    from ..drafters.autoregressive import Tree
    from ..generation import drafter_of, generate
    from ..speech import Speech
    from ..target import Target

    talk = Conversation(model, device, host=host_of(plugins))
    target = Target(talk.model, talk.tokenizer)
    drafter = drafter_of(None if draft == "none" else draft, target, None if tree is None else Tree(k, *tree))
    encoded = talk.ask(prompt)
    speech = Speech(talk.tokenizer)

    def tell(rows: list[list[int]]) -> None:
        click.echo(speech.add(rows[0]), nl=False)

    made = generate(
        target, encoded["input_ids"], drafter, max_new_tokens, temperature, top_k=top_k, top_p=top_p, k=k, rule=rule, seed=seed, tell=None if as_json else tell,
    )  # fmt: skip
    if as_json:
        said = made.decoded.tokens[0]
        text = talk.tokenizer.decode(said, skip_special_tokens=True)
        emit({"model": model, "draft": draft, "text": text, "token_ids": said, **made.stats})
        return
    click.echo()
    stats = made.stats
    total = stats["prompt_seconds"] + stats["seconds"]
    click.echo(f"{stats['tokens']} tokens, {stats['tokens'] / total:.1f} a second, {made.acceptance_length:.2f} a round", err=True)
