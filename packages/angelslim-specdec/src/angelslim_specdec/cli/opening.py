"""Opening what commands are given: a target with its tokenizer, in the dtype that it is to be run in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from angelslim_core.cli.common import host_of
from angelslim_core.device import free_ram_bytes, pick_device

if TYPE_CHECKING:
    from ..target import Target

DTYPES = ("auto", "bf16", "fp16", "fp32")


def open_target(model: str, device: str, dtype: str = "auto", plugins: Sequence[str] = (), fused: bool | None = None) -> Target:
    """A target with its tokenizer.

    Args:
        dtype: "auto" is the stored one, but fp32 where the processor multiplies that faster and the memory suffices.
        fused: as for `Target`.

    Raises:
        ModelError: no such folder, or no target.
    """
    import torch

    from angelslim_core.io.hub import resolve
    from angelslim_core.loading import load_model
    from angelslim_core.products import slow_on_cpu

    from ..target import Target

    where = pick_device(device)
    loaded = load_model(resolve(model), where, host=host_of(plugins))
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    wanted = named.get(dtype)
    widens = wanted is None and where == "cpu" and loaded.model.dtype in slow_on_cpu()
    if widens and 4 * loaded.model.num_parameters() < free_ram_bytes() // 2:
        wanted = torch.float32
    return Target(loaded.model if wanted is None else loaded.model.to(wanted), loaded.tokenizer, fused=fused)
