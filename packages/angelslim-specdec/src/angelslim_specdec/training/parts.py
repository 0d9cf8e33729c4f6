"""Draft and target in parts over the processes of a training, where they would not fit whole into each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from angelslim_core.errors import ModelError
from angelslim_core.parallel import Group

from ..drafts.base import Draft, Loss

if TYPE_CHECKING:
    from angelslim_core.sharded import Sharded

    from ..target import Target

_Read = Callable[[Sequence[int]], list[tuple[Tensor, Tensor]]]


def parts_of(draft: Draft, group: Group) -> Sharded:
    """A draft whose fp32 weights lie in parts; called, it gives its loss."""
    from angelslim_core.sharded import Sharded

    def call(part: Draft, *arguments: Any) -> tuple[Tensor, Loss]:
        loss = part.train_loss(*arguments)
        return loss.sums, loss

    return Sharded(draft, call, group)


def spread_layers(target: Target, group: Group, device: torch.device) -> None:
    """Lay a frozen target's layers in parts over processes, by FSDP2: each is gathered while it computes. All processes then run it together.

    Embedding, head and last norm, which drafts read too, stay whole.

    Args:
        target: on the device, or on the CPU, from which its layers go to the device one by one.

    Raises:
        ModelError: a layer holds codes of quantized weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    target.model.requires_grad_(False)
    for layer in target.layers:
        if any(t.ndim > 1 and not t.is_floating_point() for t in chain(layer.parameters(), layer.buffers())):
            raise ModelError(
                796, "--shard all", "the target's linears are run on their codes, which cannot lie in parts", "dump its features, or --shard draft"
            )
    mesh = init_device_mesh(device.type, (group.size,))
    inside = {p for layer in target.layers for p in layer.parameters()}
    outside = {p for p in target.model.parameters() if p not in inside}
    for layer in target.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(target.model, mesh=mesh, ignored_params=outside)  # so that a layer is fetched while the one before computes
    target.model.to(device)


def read_together(read: _Read, group: Group) -> _Read:
    """`read` of a target that runs in all processes or in none: one that lacks nothing, while others do, reads a row for their sake."""

    def together(numbers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        if not bool(group.reduce(torch.tensor(float(len(numbers))), "max")):
            return []
        return read(numbers) if numbers else read([0])[:0]

    return together
