"""Linears whose inputs or outputs are multiplied by an orthogonal matrix while the model runs.

Their weights were multiplied by its inverse when they were stored, so a reader that leaves the multiplication out
computes garbage. Config and tensors are those of compressed-tensors (`transform_config`): matrices of type "hadamard"
are Sylvester's and not read, those of type "random-hadamard" are stored once, with entries +1 and -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import regex

from .errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .io.checkpoint import Checkpoint

_WHERE = "config.json: transform_config"
# locations at which a matrix is part of the stored weights already
_FOLDED = ("weight_input", "weight_output")


@dataclass(frozen=True)
class Transform:
    """A matrix, and the linears whose inputs or outputs it multiplies.

    Args:
        name: of its group in the config.
        targets: names of linears, `re:` and a pattern for the start of a name, or "Linear" for all.
        ignore: those of `targets` that it leaves alone, same syntax.
        size: its order, None for the width of each linear; wider axes are multiplied block by block.
        multiply: (x [..., I] fp32, size) -> x Q along the last axis.
        outputs: it multiplies outputs, not inputs.
        tensor: name of the tensor that holds the matrix, None if it is Sylvester's.
    """

    name: str
    targets: tuple[str, ...]
    size: int | None
    multiply: Callable[[Tensor, int], Tensor]
    ignore: tuple[str, ...] = ()
    outputs: bool = False
    tensor: str | None = None

    def applies(self, module: str) -> bool:
        """Whether it belongs to a linear of the checkpoint."""
        return any(_named(t, module) for t in self.targets) and not any(_named(t, module) for t in self.ignore)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., I] times the matrix, in the dtype of `x`."""
        return self.multiply(x.float(), self.size or x.shape[-1]).to(x.dtype)

    def matrix(self) -> Tensor:
        """[size, size] of +1 and -1, fp32."""
        import torch

        assert self.size
        return (self(torch.eye(self.size)) * self.size**0.5).round()


def install(linear: nn.Module, module: str, transforms: Iterable[Transform]) -> None:
    """From now on a linear multiplies its inputs and outputs as the transforms that apply to it say; once is enough.

    Args:
        module: its name in the checkpoint.

    Raises:
        ModelError: a matrix does not fit the linear.
    """
    import torch

    chosen = [t for t in transforms if t.applies(module)]
    if not chosen or transforms_of(linear):
        return
    linear.transforms = chosen  # type: ignore[assignment]
    for transform in chosen:
        transform(torch.zeros(1, int(linear.out_features if transform.outputs else linear.in_features)))  # type: ignore[arg-type]
        if transform.outputs:
            linear.register_forward_hook(lambda _, args, out, transform=transform: transform(out))  # type: ignore[misc]
        else:
            linear.register_forward_pre_hook(lambda _, args, transform=transform: (transform(args[0]), *args[1:]))  # type: ignore[misc]


def transforms_of(linear: nn.Module) -> Sequence[Transform]:
    """The transforms that `install` gave a linear."""
    return getattr(linear, "transforms", ())  # type: ignore[return-value]


def multiply_sylvester(x: Tensor, size: int) -> Tensor:
    """`x` [..., I] times Sylvester's matrix, scaled to be orthogonal, in blocks of `size`, a power of two."""
    exponent = size.bit_length() - 1
    y = x.reshape(-1, 1 << exponent // 2, 1 << (exponent + 1) // 2)
    y = sylvester(y.shape[1]).to(y) @ (y @ sylvester(y.shape[2]).to(y))
    return (y * size**-0.5).reshape(x.shape)


@lru_cache
def sylvester(order: int) -> Tensor:
    """Symmetric matrix of a power of two, entries +1 and -1, not scaled."""
    import torch

    matrix = torch.ones(1, 1)
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1], [1, -1]]))
    return matrix


# the config, both ways ------------------------------------------------------------------------------------------------


def transform_config(transforms: Iterable[Transform]) -> dict[str, Any]:
    """What `quantization_config` says of transforms."""
    groups = {
        t.name: {
            "type": "random-hadamard" if t.tensor else "hadamard",
            "apply": [{"targets": list(t.targets), "location": "output" if t.outputs else "input", "inverse": False, "ignore": list(t.ignore)}],
            "randomize": False,
            "requires_grad": False,
            "head_dim": t.size,
            "precision": "torch.float32",
        }
        for t in transforms
    }
    return {"transform_config": {"config_groups": groups}} if groups else {}


def read_transforms(config: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[tuple[Transform, ...], frozenset[str]]:
    """Inverse of `transform_config`.

    Args:
        config: `quantization_config` of a checkpoint (hostile input).

    Returns:
        the transforms, and the names of all tensors that hold matrices.

    Raises:
        ModelError: a transform is not known here; leaving it out would change what the model computes.
    """
    described = config.get("transform_config")
    if not described:
        return (), frozenset()
    groups = described.get("config_groups") if isinstance(described, dict) else None
    if not isinstance(groups, dict) or not all(isinstance(g, dict) and isinstance(g.get("apply", []), list) for g in groups.values()):
        raise ModelError(370, _WHERE, "has no config_groups of a known form")
    found: list[Transform] = []
    tensors: set[str] = set()
    for name, group in groups.items():
        for args in group.get("apply", []):
            if not isinstance(args, dict):
                raise ModelError(381, f"{_WHERE}: {name:.100}", f"cannot be applied: {args!r:.100}")
            if args.get("location") in _FOLDED:
                continue
            suffix = f".{name}_{args.get('location')}."
            matrices = sorted(t for t in checkpoint.tensors if suffix in t)
            tensors.update(matrices)
            found.append(_parse(str(name), group, args, [t for t in matrices if t.endswith("weight")], checkpoint))
    return tuple(found), frozenset(tensors)


def _parse(name: str, group: Mapping[str, Any], args: Mapping[str, Any], matrices: Sequence[str], checkpoint: Checkpoint) -> Transform:
    where, kind, size, location = f"{_WHERE}: {name:.100}", group.get("type"), group.get("head_dim"), args.get("location")
    if kind not in ("hadamard", "random-hadamard") or group.get("randomize") or location not in ("input", "output"):
        raise ModelError(371, where, f"a {kind!r:.50} at {location!r:.50} is not known here{', nor permuted ones' if group.get('randomize') else ''}")
    if size is not None and (type(size) is not int or not 0 < size < 1 << 20):
        raise ModelError(372, where, f"head_dim is {size!r:.50}, not a size")
    targets, ignore = _strings(args.get("targets"), where), _strings(args.get("ignore") or [], where)
    if kind == "hadamard":
        return Transform(name, targets, size, _powers_of_two(where), ignore, location == "output")
    if not matrices:
        raise ModelError(373, where, "its matrix is not stored")
    multiply = _stored(where, matrices, bool(args.get("inverse")), checkpoint)
    return Transform(name, targets, size, multiply, ignore, location == "output", matrices[0])


def _powers_of_two(where: str) -> Callable[[Tensor, int], Tensor]:
    def multiply(x: Tensor, size: int) -> Tensor:
        if size & (size - 1) or x.shape[-1] % size:
            raise ModelError(374, where, f"{x.shape[-1]} channels have no Sylvester matrix of order {size}")
        return multiply_sylvester(x, size)

    return multiply


def _stored(where: str, names: Sequence[str], inverse: bool, checkpoint: Checkpoint) -> Callable[[Tensor, int], Tensor]:
    """Multiplication by matrices of +1 and -1 in a checkpoint; linears of one width share one."""
    by_size = {checkpoint.tensors[n].shape[-1]: n for n in names if len(set(checkpoint.tensors[n].shape)) == 1 and len(checkpoint.tensors[n].shape) == 2}

    @lru_cache
    def matrix(size: int, device: torch.device) -> Tensor:
        if size not in by_size:
            raise ModelError(375, where, f"no matrix of order {size} is stored")
        stored = checkpoint.read(by_size[size]).to(device).float() * size**-0.5
        return stored.T.contiguous() if inverse else stored

    def multiply(x: Tensor, size: int) -> Tensor:
        q = matrix(size, x.device).to(x)
        if x.shape[-1] % size:
            raise ModelError(376, where, f"{x.shape[-1]} channels do not divide into blocks of {size}")
        return (x.unflatten(-1, (-1, size)) @ q).flatten(-2)

    return multiply


def _strings(values: Any, where: str) -> tuple[str, ...]:
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ModelError(377, where, f"targets and ignore are lists of names, not {values!r:.100}")
    return tuple(values)


def _named(rule: str, module: str) -> bool:
    if rule.startswith("re:"):
        try:
            return regex.match(rule[3:], module, timeout=1.0) is not None
        except (regex.error, TimeoutError, RecursionError) as error:
            raise ModelError(378, _WHERE, f"{rule!r:.200} is no usable regular expression") from error
    return rule in ("Linear", module)
