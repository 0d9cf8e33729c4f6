"""`angelslim quant ...`."""

from __future__ import annotations

import click

from angelslim_core.cli.common import emit, host_of, json_option, plugins_option, progress, table


@click.command("sensitivity")
@click.option("--model", required=True, metavar="M", help="Model folder, or a hub id when online.")
@click.option("--data", required=True, metavar="FILE", help="Calibration data, text or JSONL.")
@click.option("--out", required=True, metavar="F", help="JSON file to write.")
@click.option("--candidates", default="int4,int8a16,keep", show_default=True, metavar="A,B", help="Schemes to try, as quant.mixed names them.")
@click.option("--group-size", default=128, show_default=True, type=click.IntRange(min=8), help="Inputs that share a scale in integer weights.")
@click.option("--asymmetric", is_flag=True, help="Integer weights have zero points.")
@click.option("--samples", default=32, show_default=True, type=click.IntRange(min=1), help="Samples to measure on; half of them serve to quantize on trial.")
@click.option("--tokens", default=512, show_default=True, type=click.IntRange(min=2), help="Tokens a sample, at most.")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(min=1), help="Samples a forward pass.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of everything random.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
@click.option("--replace", is_flag=True, help="Replace an existing file once the new one is complete.")
@plugins_option
@json_option
def sensitivity(
    model: str, data: str, out: str, candidates: str, group_size: int, asymmetric: bool, samples: int, tokens: int, batch_size: int,
    seed: int, device: str, replace: bool, plugins: list[str], as_json: bool,
) -> None:  # fmt: skip
    """Measure what each scheme would cost each linear in KL, for any number of quant.mixed runs.

    A measurement that was stopped goes on where it was when the same command is given again.
    """
    from .measuring import measure_model

    options = {"candidates": [n for n in candidates.split(",") if n], "group_size": group_size, "symmetric": not asymmetric, "samples": samples}
    calibration = {"data": data, "samples": samples, "tokens": tokens, "batch_size": batch_size}
    with progress("measuring") as report:
        found = measure_model(model, out, calibration, options, seed=seed, device=device, replace=replace, progress=report, host=host_of(plugins))
    if as_json:
        emit(found)
        return
    for line in found["warnings"]:
        click.echo(f"warning: {line}", err=True)
    table(
        [(r["scheme"], f"{r['bits_per_weight']:.3f}", f"{r['predicted_kl']:.4f}") for r in found["uniform"]], ("all linears", "bits a weight", "predicted KL")
    )
    click.echo(f"{len(found['units'])} units, {found['tokens']} tokens   {found['path']}")


@click.command("delta")
@click.argument("base")
@click.argument("post")
@click.argument("out")
@plugins_option
@json_option
def delta(base: str, post: str, out: str, plugins: list[str], as_json: bool) -> None:
    """How much of what training changed, POST - BASE, is left in OUT, quantized from POST."""
    from angelslim_core.io.hub import resolve

    from .delta_report import delta_report

    host = host_of(plugins)
    with progress("comparing") as report:
        found = delta_report(
            resolve(base), resolve(post), resolve(out), layouts=host.registry.layouts, exporters=host.registry.exporters.values(), progress=report
        )
    if as_json:
        emit(found)
        return
    share = {name: count / max(1, found["weights"]) for name, count in found["outcomes"].items()}
    click.echo(f"{found['weights']} weights, of which {found['changed'] / max(1, found['weights']):.1%} changed")
    click.echo(f"sign preservation {found['spr']:.4f}   cosine {found['cosine']:.4f}   mean squared error {found['mse']:.3e}")
    click.echo("   ".join(f"{name} {part:.1%}" for name, part in share.items()))
    worst = sorted(found["tensors"], key=lambda row: row["cosine"])[:8]
    table([(r["name"], f"{r['spr']:.4f}", f"{r['cosine']:.4f}", f"{r['mse']:.3e}") for r in worst], ("least cosine", "SPR", "cosine", "MSE"))
