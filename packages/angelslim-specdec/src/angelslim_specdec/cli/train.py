"""`angelslim specdec train`."""

from __future__ import annotations

from typing import Any, Literal

import click

from angelslim_core.cli.common import emit, json_option, plugins_option, progress, stoppable
from angelslim_core.errors import UsageError

from .opening import device_option, dtype_option, open_target


@click.command("train")
@click.option("--model", required=True, metavar="M", help="The target: model folder, or a hub id when online.")
@click.option("--data", metavar="FILE", help="JSONL of conversations that the target answered, as `regen` writes it.")
@click.option("--features", metavar="DIR", help="What `dump` wrote, instead of running the target on --data; the target's layers are then not needed.")
@click.option("--draft", required=True, metavar="NAME", help="Kind of draft: eagle3, dflash, dflare, dfly, dspark, mtp, or a plugin's.")
@click.option("--out", required=True, metavar="D", help="Draft folder to create.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps; instead of --epochs.")
@click.option("--epochs", default=10.0, show_default=True, type=click.FloatRange(0, min_open=True), help="How often each row is trained on.")
@click.option(
    "--draft-vocab", type=click.IntRange(min=1), metavar="N", help="Tokens the draft may propose: the most frequent ones; its kind's default if not given."
)
@click.option("--vocab", metavar="FILE", help="What `vocab` wrote, instead of counting.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the draft, as in ttt_steps=5; may be repeated.")
@click.option("--length", default=2048, show_default=True, type=click.IntRange(min=8), help="Tokens of a packed row, at most; longer conversations are cut.")
@click.option("--batch", type=click.IntRange(min=1), help="Rows a step, over all processes; 4 on a GPU, 1 on a CPU if not given.")
@click.option("--lr", default=5e-4, show_default=True, type=click.FloatRange(0, min_open=True), help="Highest learning rate.")
@click.option("--warmup", default=0.015, show_default=True, type=click.FloatRange(0, 1), help="Share of the steps in which the rate rises.")
@click.option("--weight-decay", default=0.0, show_default=True, type=click.FloatRange(0), help="AdamW's, of matrices.")
@click.option("--clip", default=0.5, show_default=True, type=click.FloatRange(0, min_open=True), help="Most that the gradients' norm may be.")
@click.option("--accumulate", default=1, show_default=True, type=click.IntRange(min=1), help="Batches a step.")
@click.option("--validation", type=click.FloatRange(0, 0.5), help="Share of conversations held out; .02 from 500 conversations on, else 0, if not given.")
@click.option(
    "--every",
    default=500,
    show_default=True,
    type=click.IntRange(min=1),
    help="Steps between validation, --probe, and states that a killed training goes on with.",
)
@click.option(
    "--probe",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Measure acceptance by decoding N held-out prompts; trained ones where none is held out.",
)
@click.option(
    "--export-every", default=0, show_default=True, type=click.IntRange(min=0), metavar="N", help="Also write the draft as OUT.step-N each N steps; 0: never."
)
@click.option(
    "--turns",
    default="joined",
    show_default=True,
    type=click.Choice(["joined", "each"]),
    help="Train on all answers of a conversation at once, or on each with the history as the template shows it then.",
)
@click.option(
    "--keep",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "device", "host", "nowhere"]),
    help="Where features stay once computed; auto: where they fit.",
)
@click.option(
    "--shard",
    default="none",
    show_default=True,
    type=click.Choice(["none", "draft", "all"]),
    help="What lies in parts over the processes (FSDP2) instead of whole in each: the draft's fp32 weights and moments, or the target's layers too.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of everything random.")
@click.option("--replace", is_flag=True, help="Replace an existing output once the new one is complete.")
@device_option
@dtype_option
@plugins_option
@json_option
def command(
    model: str, data: str | None, features: str | None, draft: str, out: str, steps: int | None, epochs: float, draft_vocab: int | None, vocab: str | None,
    settings: tuple[str, ...], length: int, batch: int | None, lr: float, warmup: float, weight_decay: float, clip: float, accumulate: int,
    validation: float | None, every: int, probe: int, export_every: int, turns: Literal["joined", "each"], keep: str, shard: str, seed: int, replace: bool,
    device: str, dtype: str, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Train a draft on what the target says, and on what it computes while it says it.

    Several GPUs: torchrun --nproc-per-node N -m angelslim_core specdec train ... A stopped or killed training goes on when the same
    command is run again, with any number of processes and any --shard.
    """
    from angelslim_core.context import silent
    from angelslim_core.device import pick_device
    from angelslim_core.parallel import is_first, joined, of_several

    if (data is None) == (features is None):
        raise UsageError(741, "--data", "and --features exclude each other, and one of them is needed")
    if shard != "none" and not of_several():
        raise UsageError(795, "--shard", "there is one process, which has nobody to share with", "start several with torchrun")
    if shard == "all" and (features is not None or probe):
        raise UsageError(
            796, "--shard all", f"is for a target that training runs in all processes; with --{'probe' if probe else 'features'} it is not", "--shard draft"
        )
    if features is not None and (idle := [name for name in ("length", "turns") if _is_given(name)]):
        raise UsageError(790, f"--{idle[0]}", "is of --data: features have what `dump` was given", "leave it out, or dump anew")
    arguments = dict(locals())
    where = pick_device(device)
    with joined(where) as group, stoppable() as stop_requested, progress("training") as report:
        document = _run(arguments, where, group, report if is_first() else silent, stop_requested)
    if not is_first():
        return
    if as_json:
        emit({"path": out, **document})
        return
    shown = document["training"]
    click.echo(
        f"{document['steps']} steps, {document['seconds']:.0f} s, {document['tokens_per_second']:.0f} tok/s; {document['conversations']} conversations, {document['tokens']} tokens"
    )
    click.echo(
        f"loss {shown['loss']:.3f}   accuracy {' '.join(f'{a:.3f}' for a in shown['accuracy'])}   expected acceptance length {shown['expected_acceptance_length']:.2f}"
    )
    if "validation" in document:
        held = document["validation"]
        click.echo(
            f"held out: loss {held['loss']:.3f}   accuracy {' '.join(f'{a:.3f}' for a in held['accuracy'])}   expected {held['expected_acceptance_length']:.2f}"
        )
    if "measured" in document:
        click.echo(f"measured acceptance length {document['measured']['acceptance_length']:.2f} at k = {document['measured']['k']}, bonus token counted")
    click.echo(f"{out}   next: angelslim specdec bench --model {model} --draft {out} --prompts FILE")


def _run(given: dict[str, Any], where: str, group: Any, report: Any, stop_requested: Any) -> dict[str, Any]:
    import torch

    from ..training.parts import spread_layers
    from ..training.whole import train_draft

    device = torch.device("cuda", torch.cuda.current_device()) if where == "cuda" else torch.device("cpu")
    if given["shard"] == "all":
        target = open_target(given["model"], "cpu", given["dtype"], given["plugins"], runs_on=where)
        spread_layers(target, group, device)
    else:
        target = open_target(given["model"], "cpu" if given["features"] is not None and not given["probe"] else where, given["dtype"], given["plugins"])
    given["settings"] = options_of(given["settings"])
    return train_draft(given, target, device, group=group, progress=report, stop_requested=stop_requested)


def _is_given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def options_of(settings: tuple[str, ...], option: str = "--set", example: str = "ttt_steps=5") -> dict[str, Any]:
    """What an option such as --set gives by KEY=VALUE, values as YAML.

    Raises:
        UsageError: not KEY=VALUE.
    """
    import yaml

    found: dict[str, Any] = {}
    for setting in settings:
        key, is_one, value = setting.partition("=")
        try:
            if not is_one or not key.isidentifier():
                raise ValueError
            found[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise UsageError(742, option, f"{setting!r:.100} is not KEY=VALUE", f"as in {example}") from error
    return found
