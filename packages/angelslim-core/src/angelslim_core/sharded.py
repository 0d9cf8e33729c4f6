"""Parameters that lie in parts over processes, by FSDP2: each process keeps and steps a share of their rows, in fp32.

Nothing else changes: losses are sums and counts as ever, states are whole, and go on with any number of processes, or without parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .errors import ModelError
from .parallel import Group


class Sharded:
    """A copy of a module, to be trained in parts. The module itself has values only between `gather` and `release`.

    Its parameters are one unit, gathered for a call and the way back: a call may use any of them at any time.

    Args:
        module: on the device, its parameters of one dtype, in which is computed, and alike in all processes.
        call: call(copy, *arguments) -> tensors through which the way back begins, and anything else.
        group: of several processes.

    Raises:
        ModelError: a parameter is a single number.
    """

    def __init__(self, module: nn.Module, call: Callable[..., tuple[Tensor, Any]], group: Group) -> None:
        if single := [name for name, p in module.named_parameters() if p.ndim == 0]:
            raise ModelError(424, single[0], "is a single number, which has no rows to share", "make it a vector of one")
        (dtype,) = {p.dtype for p in module.parameters()}
        self.group, self._module = group, module
        part = copy.deepcopy(module).train()
        self.release()
        for p in part.parameters():
            p.data = p.data.float()
        mesh = init_device_mesh(next(part.parameters()).device.type, (group.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._call = _Call(part, call)
        state = fully_shard(self._call, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        state.set_gradient_divide_factor(1.0)  # sums, as losses are
        state.set_force_sum_reduction_for_comms(True)
        self._parameters: dict[str, DTensor] = dict(part.named_parameters())  # type: ignore[arg-type]

    def named_parameters(self) -> dict[str, DTensor]:
        """The parameters in parts, whose gradients are summed over all processes, by their names in the module."""
        return self._parameters

    def __call__(self, *arguments: Any) -> Any:
        """What `call` gives, but for the first; all processes must call it."""
        self.group.meet()
        return self._call(*arguments)[1]

    @torch.no_grad()
    def gather(self) -> None:
        """Give the module the values of now; all processes must call it."""
        self.group.meet()
        for name, p in self._module.named_parameters():
            p.data = self._parameters[name].full_tensor().to(p.dtype)

    def release(self) -> None:
        """Take the module's values away, which frees their memory."""
        for p in self._module.parameters():
            p.data = p.data.new_zeros(()).expand(p.shape)

    @staticmethod
    def rows(tensor: Tensor) -> Tensor:
        """This process's rows of a parameter or gradient, in the same memory."""
        assert isinstance(tensor, DTensor)
        local: Tensor = tensor.to_local()
        return local.detach()

    def whole(self, rows: Tensor, name: str) -> Tensor:
        """What the rows of all processes make, which lie as those of the parameter of that name; all processes must call it."""
        like = self._parameters[name]
        self.group.meet()
        return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()).full_tensor()

    def first_row(self, name: str) -> int:
        """Number of this process's first row; all have equally many but the last ones, which may have fewer, or none."""
        all_rows = len(self._parameters[name])
        return min(-(-all_rows // self.group.size) * self.group.rank, all_rows)


class _Call(nn.Module):
    """Makes of a method what FSDP knows: a forward with tensors among what it returns."""

    def __init__(self, module: nn.Module, call: Callable[..., tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.module, self._of = module, call

    def forward(self, *arguments: Any) -> tuple[Tensor, Any]:
        return self._of(self.module, *arguments)
