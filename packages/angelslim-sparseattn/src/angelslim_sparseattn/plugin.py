"""What this package brings; nothing heavy is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from angelslim_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from angelslim_core.kernels import Kernel
    from angelslim_core.passes import Pass

ANGELSLIM_HOOKS = 1


@hookimpl
def angelslim_register_passes() -> list[type[Pass]]:
    from .passes import PASSES

    return [*PASSES]


@hookimpl
def angelslim_register_kernels() -> list[Kernel]:
    from .kernels.block_sparse import BLOCK_SPARSE

    return [BLOCK_SPARSE]


@hookimpl
def angelslim_register_commands(cli: click.Group) -> None:
    from .cli import bench_command, choose_command

    cli.add_command(bench_command)
    cli.add_command(choose_command)


@hookimpl
def angelslim_default_steps() -> list[dict[str, Any]]:
    return [{"use": "sparseattn.stem"}]
