"""Every hook a plugin can implement. Docstrings are the contract; there is no logic here.

A plugin is a module named by an entry point of the group `angelslim`. It declares the version of these hooks it was
written for as `ANGELSLIM_HOOKS = 1`; another version is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import click

    from .adapters.base import Layout
    from .artifact import Artifact
    from .context import Context
    from .exporters import Exporter
    from .kernels import Kernel
    from .packed import PackedLinear
    from .passes import Pass
    from .plan import Plan

HOOK_VERSION = 1
# reserved plugin ids -> the distribution each belongs to
OFFICIAL: Mapping[str, str] = {name: f"angelslim-{name}" for name in ("quant", "specdec", "sparseattn", "mmprune", "distill")}

hookspec = pluggy.HookspecMarker("angelslim")
hookimpl = pluggy.HookimplMarker("angelslim")


# registration: pure functions that return classes or data


@hookspec
def angelslim_register_passes() -> Sequence[type[Pass]]:
    """Passes of this plugin. Each id must start with the plugin's name and a dot."""
    raise NotImplementedError


@hookspec
def angelslim_register_adapters() -> Sequence[Layout]:
    """Architectures: tables of roles over tensor names."""
    raise NotImplementedError


@hookspec
def angelslim_register_kernels() -> Sequence[Kernel]:
    """Operations with a reference and faster implementations."""
    raise NotImplementedError


@hookspec
def angelslim_register_exporters() -> Sequence[type[Exporter]]:
    """Layouts of quantized weights in a checkpoint."""
    raise NotImplementedError


@hookspec
def angelslim_register_linears() -> Sequence[type[PackedLinear]]:
    """Linears that run on codes as they are stored, preferred first. Called when a quantized checkpoint is loaded."""
    raise NotImplementedError


@hookspec
def angelslim_register_commands(cli: click.Group) -> None:
    """Add commands to the plugin's own group, `angelslim PLUGIN ...`."""


@hookspec
def angelslim_default_steps(device: str, model: Path | None) -> Sequence[dict[str, Any]]:
    """Steps that `run --plugins PLUGIN` runs when neither a recipe nor `--use` is given.

    Args:
        device: "cpu", or "cuda:MAJOR.MINOR" with the compute capability.
        model: the model's folder, unchecked; None where it is named by a hub id, or not yet.
    """
    raise NotImplementedError


@hookspec(historic=True)
def angelslim_addhooks(pluginmanager: pluggy.PluginManager) -> None:
    """Called with the plugin manager when the plugin loads, to add hooks of its own."""


# lifecycle


@hookspec
def angelslim_modify_plan(plan: Plan) -> None:
    """Edit a finished plan in place before anything runs (for instance to add a warning)."""


@hookspec(firstresult=True)
def angelslim_run_pass(pass_: Pass, context: Context, execute: Any) -> Any:
    """Run one pass by calling `execute()`. The core does it last; wrap it to time, trace or veto a pass."""


@hookspec
def angelslim_run_finished(artifact: Artifact) -> None:
    """Called when the output folder has been published."""
