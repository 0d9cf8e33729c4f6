"""`angelslim run`."""

from __future__ import annotations

from typing import Any

import click

from ..parallel import is_first
from .common import emit, json_option, plugins_option, progress, show_evaluation, size, stoppable, table


@click.command("run")
@click.argument("recipe", required=False)
@click.option("--model", metavar="M", help="Model folder, or a hub id when online.")
@click.option("--out", metavar="D", help="Folder to create.")
@plugins_option
@click.option("--use", multiple=True, metavar="PASS_ID", help="Pass to run, instead of a recipe; may be repeated.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe, e.g. steps[0].with.group_size=64.")
@click.option("--dry-run", is_flag=True, help="Plan from headers and write nothing.")
@click.option("--replace", is_flag=True, help="Replace an existing output once the new one is complete.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of everything random.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
@json_option
def run(
    recipe: str | None, model: str | None, out: str | None, plugins: list[str], use: tuple[str, ...], overrides: tuple[str, ...],
    dry_run: bool, replace: bool, seed: int | None, device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Compress a model into a new folder.

    RECIPE is a YAML file or the name of a shipped recipe. Without one, --use names passes; without those, each plugin
    of --plugins runs its default preset.
    """
    from ..pipeline import compress, prepare

    arguments: dict[str, Any] = {"recipe": recipe, "plugins": plugins, "overrides": overrides, "seed": seed, "device": device}
    if dry_run and not is_first():
        return
    if dry_run:
        plan = prepare(model, use, out, **arguments).plan
        if as_json:
            emit(plan.as_dict())
        else:
            _show_plan(plan.as_dict())
        return
    with stoppable() as stop_requested, progress("compressing") as report:
        result = compress(model, use, out, replace=replace, progress=report, stop_requested=stop_requested, **arguments)
    if not is_first():
        return
    if as_json:
        emit(result.as_dict())
        return
    for line in result.fallbacks:
        click.echo(f"fallback: {line}", err=True)
    for line in result.warnings:
        click.echo(f"warning: {line}", err=True)
    done = result.as_dict()
    for step in done["passes"]:
        metrics = step["metrics"]
        quality = f", {metrics['linears']} linears, SQNR {metrics['sqnr_db_mean']:.1f} dB" if "sqnr_db_mean" in metrics else ""
        click.echo(f"{step['id']}: {step['seconds']:.1f} s{quality}")
    if "perplexity" in done["metrics"]:
        show_evaluation(done["metrics"])
    ratio = done["bytes_after"] / done["bytes_before"]
    of = f" in the largest of {done['processes']} processes" if done["processes"] > 1 else ""
    peak = size(done["peak_ram_bytes"]) + (f" and {size(done['peak_gpu_bytes'])} of the GPU" if done["peak_gpu_bytes"] else "")
    click.echo(f"{size(done['bytes_before'])} -> {size(done['bytes_after'])} ({ratio:.2f}), {done['seconds']:.1f} s, peak memory {peak}{of}")
    click.echo(f"{done['path']}   next: angelslim eval {done['path']} --base {model or 'MODEL'} --text FILE")


def _show_plan(plan: dict[str, Any]) -> None:
    rows = [(s["pass"], s["kind"], str(s["tensors"]), ", ".join(f"{k}={v}" for k, v in s["options"].items())) for s in plan["plan"]]
    table(rows, ("pass", "kind", "linears", "options"))
    actions: dict[str, int] = {}
    for row in plan["tensors"]:
        actions[row["action"]] = actions.get(row["action"], 0) + 1
    click.echo("tensors: " + ", ".join(f"{count} {action}" for action, count in actions.items()))
    click.echo(f"{size(plan['bytes_before'])} -> {size(plan['bytes_after'])} in {plan['shards']} file(s), about {size(plan['peak_ram_bytes'])} of memory")
    table([(name, "yes" if v["ok"] else "no", v["why"]) for name, v in plan["engines"].items()], ("engine", "loads it", "why"))
    for line in (*plan["problems"], *plan["warnings"]):
        click.echo(f"note: {line}")
