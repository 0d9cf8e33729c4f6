"""Opening what commands are given: a target with its tokenizer, where and in the dtype that it is to be run in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from angelslim_core.cli.common import host_of
from angelslim_core.device import free_ram_bytes, pick_device

if TYPE_CHECKING:
    from ..target import Target

Function = TypeVar("Function", bound=Callable[..., Any])


def device_option(function: Function) -> Function:
    """Add `--device`."""
    return click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")(function)


def dtype_option(function: Function) -> Function:
    """Add `--dtype`, of the target and of what is made for it."""
    choices, about = click.Choice(["auto", "bf16", "fp16", "fp32"]), "To run the target in; auto: as stored, or fp32 where a CPU is faster in it."
    return click.option("--dtype", default="auto", show_default=True, type=choices, help=about)(function)


def open_target(
    model: str, device: str, dtype: str = "auto", plugins: Sequence[str] = (), runs_on: str | None = None, fused: bool | None = None
) -> Target:  # fmt: skip
    """A target with its tokenizer.

    Args:
        dtype: "auto" is the stored one, but fp32 where the processor multiplies that faster and the memory suffices.
        runs_on: the device it is to be moved to; None: it runs where it is opened.
        fused: as for `Target`.

    Raises:
        ModelError: no such folder, or no target.
    """
    import torch

    from angelslim_core.io.hub import resolve
    from angelslim_core.loading import load_model
    from angelslim_core.products import slow_on_cpu

    from ..target import Target, recast

    where = pick_device(device)
    loaded = load_model(resolve(model), where, host=host_of(plugins))
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    wanted = named.get(dtype)
    widens = wanted is None and (runs_on or where) == "cpu" and loaded.model.dtype in slow_on_cpu()
    if widens and 4 * loaded.model.num_parameters() < free_ram_bytes() // 2:
        wanted = torch.float32
    if wanted is not None:
        recast(loaded.model, wanted)
    return Target(loaded.model, loaded.tokenizer, fused=fused)
