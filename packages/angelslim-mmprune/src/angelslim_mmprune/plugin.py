"""What this package brings; nothing heavy is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from angelslim_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    import click

    from angelslim_core.kernels import Kernel
    from angelslim_core.passes import Pass
    from angelslim_core.plan import Plan

ANGELSLIM_HOOKS = 1
# where a model's folder may have the scorer that was trained for it
SCORER = "scorer"


@hookimpl
def angelslim_register_passes() -> list[type[Pass]]:
    from .passes import PASSES

    return [*PASSES]


@hookimpl
def angelslim_register_kernels() -> list[Kernel]:
    from .dpp import DPP
    from .kernels.distinct import DISTINCT
    from .kernels.greedy import GREEDY
    from .kernels.mmr import MMR
    from .kernels.received import LSE, RECEIVED
    from .merging import SAMP_GROUPS, SAMP_MERGE

    return [MMR, GREEDY, DISTINCT, DPP, SAMP_GROUPS, SAMP_MERGE, LSE, RECEIVED]


@hookimpl
def angelslim_register_commands(cli: click.Group) -> None:
    from .cli import bench_command, show_command

    cli.add_command(bench_command)
    cli.add_command(show_command)


@hookimpl
def angelslim_modify_plan(plan: Plan) -> None:
    from .passes.fits import check

    check(plan)


@hookimpl
def angelslim_default_steps(model: Path | None) -> list[dict[str, Any]]:
    if model is not None and (model / SCORER / "config.json").is_file():
        return [{"use": "mmprune.idpruner", "with": {"scorer": str(model / SCORER)}}]
    return [{"use": "mmprune.divprune"}]
