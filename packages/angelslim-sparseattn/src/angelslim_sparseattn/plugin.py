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
    from .estimators import ANTIDIAGONAL_MASS, ANTIDIAGONAL_MEAN, MEAN_KEY_MASS, VALUE_BIAS
    from .kernels.block_sparse import BLOCK_SPARSE
    from .kernels.select_rows import COMPACT, SELECT_ROWS

    return [BLOCK_SPARSE, ANTIDIAGONAL_MEAN, VALUE_BIAS, ANTIDIAGONAL_MASS, MEAN_KEY_MASS, SELECT_ROWS, COMPACT]


@hookimpl
def angelslim_register_commands(cli: click.Group) -> None:
    from .cli import bench_command, choose_command
    from .cli_accuracy import accuracy_command

    cli.add_command(bench_command)
    cli.add_command(choose_command)
    cli.add_command(accuracy_command)


@hookimpl
def angelslim_default_steps() -> list[dict[str, Any]]:
    return [{"use": "sparseattn.stem"}]
