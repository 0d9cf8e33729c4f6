"""What this package brings; nothing heavy is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from angelslim_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import click
    import pluggy

    from angelslim_core.kernels import Kernel
    from angelslim_core.passes import Pass
    from angelslim_core.plan import Plan

ANGELSLIM_HOOKS = 1


@hookimpl
def angelslim_addhooks(pluginmanager: pluggy.PluginManager) -> None:
    from .registry import offer

    offer(pluginmanager)


@hookimpl
def angelslim_register_passes() -> list[type[Pass]]:
    from .passes import PASSES

    return [*PASSES]


@hookimpl
def angelslim_register_kernels() -> list[Kernel]:
    from .kernels.accept import ACCEPT_GREEDY, ACCEPT_RATIO
    from .kernels.layer import KERNELS
    from .kernels.settle import SETTLE
    from .kernels.tree import KERNELS as TREE_KERNELS
    from .kernels.verify_attention import VERIFY_ATTENTION

    return [VERIFY_ATTENTION, ACCEPT_GREEDY, ACCEPT_RATIO, SETTLE, *KERNELS, *TREE_KERNELS]


@hookimpl
def angelslim_register_commands(cli: click.Group) -> None:
    from .cli import add_commands

    add_commands(cli)


@hookimpl
def angelslim_modify_plan(plan: Plan) -> None:
    from .passes.fits import check

    check(plan)


@hookimpl
def angelslim_default_steps() -> list[dict[str, Any]]:
    return [{"use": "specdec.ngram"}]
