"""Parameters that lie in parts over processes, by FSDP2: each process keeps and steps a share of their rows, in fp32.

Nothing else changes: losses are sums and counts as ever, states are whole, and go on with any number of processes, or without parts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable
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

    Its parameters are one unit, gathered for a call and the way back: a call may use any of them at any time, but for those of `units`.

    Args:
        module: on the device, alike in all processes. Parameters lie in parts that have the dtype of most numbers.
        call: call(copy, *arguments) -> tensors through which the way back begins, and anything else.
        group: of several processes.
        whole: names of further parameters that every process keeps as they are.
        units: units(copy) -> modules of it whose parameters are gathered when they are called, and let go of until the way back.

    Attributes:
        module: the copy, which computes.
        whole: names of all parameters that every process keeps as they are; their gradients are its own.

    Raises:
        ModelError: a parameter is a single number.
    """

    def __init__(
        self, module: nn.Module, call: Callable[..., tuple[Tensor, Any]], group: Group, *, whole: Collection[str] = (),
        units: Callable[[nn.Module], Iterable[nn.Module]] = lambda copy: (),
    ) -> None:  # fmt: skip
        sizes = Counter[torch.dtype]()
        for name, p in module.named_parameters():
            sizes[p.dtype] += p.numel() if name not in whole else 0
        dtype = max(sizes, key=lambda found: sizes[found])  # of which alone FSDP2 makes a unit
        others = {name for name, p in module.named_parameters() if p.dtype != dtype}
        self.group, self.whole, self._original = group, frozenset(whole) | others, module
        _check_rows(module, self.whole)
        part = self.module = copy.deepcopy(module).train()
        self.release()
        mesh = init_device_mesh(next(part.parameters()).device.type, (group.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        kept = {p for name, p in part.named_parameters() if name in self.whole}
        self._call = _Call(part, call)
        for unit in (*units(part), self._call):
            for p in unit.parameters():
                if p not in kept and not isinstance(p, DTensor):
                    p.data = p.data.float()  # of one unit at a time, which is let go of once it lies in parts
            state = fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not self._call, mp_policy=policy, ignored_params=kept)
            state.set_gradient_divide_factor(1.0)  # sums, as losses are
            state.set_force_sum_reduction_for_comms(True)
        self._parameters: dict[str, Tensor] = dict(part.named_parameters())

    def named_parameters(self) -> dict[str, Tensor]:
        """The copy's parameters by their names in the module; the gradients of those in parts are summed over all processes."""
        return self._parameters

    def __call__(self, *arguments: Any) -> Any:
        """What `call` gives, but for the first; all processes must call it."""
        self.group.meet()
        return self._call(*arguments)[1]

    @torch.no_grad()
    def gather(self) -> None:
        """Give the module the values of now; all processes must call it."""
        self.group.meet()
        for name, p in self._original.named_parameters():
            found = self._parameters[name]
            p.data = found.full_tensor().to(p.dtype) if isinstance(found, DTensor) else found.detach().clone()

    def release(self) -> None:
        """Take the module's values away, which frees their memory."""
        for name, p in self._original.named_parameters():
            if name not in self.whole:
                p.data = p.data.new_zeros(()).expand(p.shape)

    @staticmethod
    def rows(tensor: Tensor) -> Tensor:
        """This process's rows of a parameter or gradient, in the same memory."""
        assert isinstance(tensor, DTensor)
        local: Tensor = tensor.to_local()
        return local.detach()

    def whole_of(self, rows: Tensor, name: str) -> Tensor:
        """What the rows of all processes make, which lie as those of the parameter of that name; all processes must call it."""
        like = self._parameters[name]
        assert isinstance(like, DTensor)
        self.group.meet()
        return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()).full_tensor()

    def first_row(self, name: str) -> int:
        """Number of this process's first row; all have equally many but the last ones, which may have fewer, or none."""
        all_rows = len(self._parameters[name])
        return min(-(-all_rows // self.group.size) * self.group.rank, all_rows)


class Spread:
    """A frozen module that lies in parts, and runs without gradients: it stays the same module, with its names.

    Args:
        module: alike in all processes; on the device, or on the CPU, from which only the parts go there, unit by unit.
        units: modules of it whose parameters are gathered when they are called, and let go of at once.

    Raises:
        ModelError: a parameter is a single number.
    """

    def __init__(self, module: nn.Module, group: Group, device: torch.device, units: Iterable[nn.Module] = ()) -> None:
        _check_rows(module)
        module.requires_grad_(False)
        mesh = init_device_mesh(device.type, (group.size,))
        for unit in units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        # what reads the rest of it, a head for instance, may do so after the call
        self._rest = fully_shard(module, mesh=mesh, reshard_after_forward=False)
        self._group = group

    def meet(self) -> None:
        """To be called before the module is, which all processes must do equally often."""
        self._group.meet()

    def release(self) -> None:
        """Let go of what lies outside of `units`, which a call gathers and leaves."""
        self._rest.reshard()


def _check_rows(module: nn.Module, whole: Collection[str] = ()) -> None:
    """
    Raises:
        ModelError: a parameter that is to lie in parts has no rows.
    """
    if single := [name for name, p in module.named_parameters() if p.ndim == 0 and name not in whole]:
        raise ModelError(424, single[0], "is a single number, which has no rows to share", "make it a vector of one")


class _Call(nn.Module):
    """Makes of a method what FSDP knows: a forward with tensors among what it returns."""

    def __init__(self, module: nn.Module, call: Callable[..., tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.module, self._of = module, call

    def forward(self, *arguments: Any) -> tuple[Tensor, Any]:
        return self._of(self.module, *arguments)
