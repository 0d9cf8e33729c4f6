"""Linears that round while a model is trained: what a `TrainedPass` puts in, and a training step trains.

What `FakeQuantizer.weight` computes is what `FakeQuantizer.quantized` stores: the reloaded linear is the trained one.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import ModelError
from .fake_cache import FakeCache, placed_caches
from .io.checkpoint import Checkpoint, dtype_name, read_header
from .io.strict_json import read_json
from .io.writer import keep_tensors, write_json
from .schemes import Quantized

if TYPE_CHECKING:
    from .schemes import Scheme


# weights that are rounded together at most, in numbers
JOINT = 1 << 27


class FakeQuantizer(nn.Module):
    """How one linear rounds. What is learnt of it, scales for instance, are its parameters (fp32).

    Some learn of the first input that they see in training what they begin with: whoever trains shows it to them first, the same one in all processes.

    Args:
        scheme: what `quantized` will give.

    Attributes:
        trains_weight: the linear's own weight is meant to be trained along; False: it is frozen.
        progress: share of the training that is done, 0 to 1, set before each step; for what is annealed.
    """

    trains_weight: ClassVar[bool] = True

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.progress = 0.0

    def weight(self, weight_OI: Tensor) -> Tensor:
        """The rounded weight in the dtype of `weight_OI`, with gradients for it and for the scales."""
        raise NotImplementedError

    def inputs(self, x: Tensor) -> Tensor:
        """The rounded input [..., I]; by default as it comes."""
        return x

    def bias(self, weight_OI: Tensor) -> Tensor | None:
        """[O], what is added to the linear's bias, with gradient; None: nothing. It stays in the stored model as a bias."""
        return None

    def factors(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What inputs are multiplied by, and what is added, as it is trained; in evaluation it must be what is stored."""
        return self.weight(weight_OI), self.biased(weight_OI, bias_O)

    def product(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The linear [..., O] as it is trained; in evaluation it must be what is stored."""
        return nn.functional.linear(self.inputs(x), *self.factors(weight_OI, bias_O))

    def joint_key(self, weight_OI: Tensor) -> Hashable:
        """Linears that are equal in this round with one call of `joint_factors`, as one matrix; None: this one rounds alone."""
        return None

    @classmethod
    def joint_factors(cls, quantizers: Sequence[Any], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
        """`factors` of each of some linears whose `joint_key` is equal, and not None."""
        raise NotImplementedError

    def biased(self, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
        """[O], the linear's bias with what the quantizer adds, rounded as it is stored."""
        extra = self.bias(weight_OI)
        if extra is None:
            return bias_O
        return extra.to(weight_OI.dtype) if bias_O is None else bias_O + extra.to(bias_O.dtype)

    def quantized(self, weight_OI: Tensor) -> Quantized:
        """Codes and scales, of which `dequantize` gives just what `weight` gives."""
        raise NotImplementedError


class FakeQuantizedLinear(nn.Linear):
    """A linear that rounds as its quantizer says, unless `rounds` is False. Made of one by `place`."""

    quantizer: FakeQuantizer
    rounds: bool
    held: tuple[Tensor, Tensor | None] | None

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds:
            return super().forward(x)
        if self.held is not None:
            return nn.functional.linear(self.quantizer.inputs(x), *self.held)
        return self.quantizer.product(x, self.weight, self.bias)


def place(linear: nn.Linear, quantizer: FakeQuantizer) -> FakeQuantizedLinear:
    """Let a linear round from now on; it stays the same module, of another class, so hooks and names stay."""
    linear.__class__ = FakeQuantizedLinear
    assert isinstance(linear, FakeQuantizedLinear)
    linear.quantizer = quantizer.to(linear.weight.device)
    linear.rounds, linear.held = True, None
    return linear


def placed(model: nn.Module) -> dict[str, FakeQuantizedLinear]:
    """The linears that round, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantizedLinear)}


def quantizers(model: nn.Module) -> dict[str, FakeQuantizer | FakeCache]:
    """How linears round, and the keys and values of attentions, by the name of the module whose `quantizer` it is."""
    return {**{name: linear.quantizer for name, linear in placed(model).items()}, **placed_caches(model)}


@contextmanager
def rounding_off(model: nn.Module) -> Iterator[None]:
    """Inside, weights, keys and values are as they are: a model whose weights are frozen is then its own teacher."""
    rounding: list[FakeQuantizedLinear | FakeCache] = [*placed(model).values(), *placed_caches(model).values()]
    before = [module.rounds for module in rounding]
    try:
        for module in rounding:
            module.rounds = False
        yield
    finally:
        for module, rounds in zip(rounding, before, strict=True):
            module.rounds = rounds


def can_hold(linear: FakeQuantizedLinear) -> bool:
    """Whether its factors can be known before its input: its quantizer makes no product of its own."""
    return type(linear.quantizer).product is FakeQuantizer.product


def _units(linears: Iterable[FakeQuantizedLinear]) -> Iterator[list[FakeQuantizedLinear]]:
    """Linears that round together, of at most `JOINT` weights, or one."""
    open_units: dict[Hashable, tuple[list[FakeQuantizedLinear], int]] = {}
    for linear in linears:
        weight, quantizer = linear.weight, linear.quantizer
        key = quantizer.joint_key(weight)
        if key is None:
            yield [linear]
            continue
        full = (type(quantizer), key, weight.dtype, weight.shape[1], quantizer.training)
        unit, size = open_units.pop(full, ([], 0))
        if unit and size + weight.numel() > JOINT:
            yield unit
            unit, size = [], 0
        unit.append(linear)
        open_units[full] = unit, size + weight.numel()
    yield from (unit for unit, _ in open_units.values())


@contextmanager
def held(linears: Collection[FakeQuantizedLinear]) -> Iterator[None]:
    """Inside, linears that round compute with what their weights are rounded to now, with gradients; alike ones are rounded together.

    A way back through products that were made inside may follow outside. Linears whose `can_hold` is False go on as ever.
    """
    linears = [linear for linear in linears if linear.rounds and can_hold(linear)]
    try:
        for unit in _units(linears):
            first, weights, biases = unit[0].quantizer, [x.weight for x in unit], [x.bias for x in unit]
            if first.joint_key(weights[0]) is None:
                found = [first.factors(weights[0], biases[0])]
            else:  # of the matrix that they make together nothing is kept: on the way back it is made anew
                quantizers = [x.quantizer for x in unit]
                found = checkpoint(type(first).joint_factors, quantizers, weights, biases, use_reentrant=False, preserve_rng_state=False)
            for linear, factors in zip(unit, found, strict=True):
                linear.held = factors
        yield
    finally:
        for linear in linears:
            linear.held = None


def set_progress(model: nn.Module, share: float) -> None:
    """Tell every quantizer how much of the training is done, 0 to 1."""
    for quantizer in quantizers(model).values():
        quantizer.progress = share


def remove(linear: FakeQuantizedLinear) -> Quantized:
    """Make a plain linear of it again, with the rounded weight, and a bias where the quantizer gave one; returns what to store."""
    quantizer = linear.quantizer.eval()
    with torch.no_grad():
        found = quantizer.quantized(linear.weight)
        bias = quantizer.biased(linear.weight, linear.bias)
        linear.weight.data = found.dequantize(linear.weight.dtype)
        if bias is not None and bias is not linear.bias:
            linear.bias = nn.Parameter(bias)
    del linear.quantizer
    linear.__class__ = nn.Linear  # type: ignore[assignment]
    return found


# parts of a `Quantized` that are kept
_PARTS = ("codes", "scale", "zero_point", "input_scale", "global_scale")
_HINT = "delete the work folder beside the output and run again"


def write_trained(workdir: Path, trained: Mapping[str, Quantized]) -> None:
    """Keep what training left of linears, by their names in the checkpoint, for `read_trained`: all of it, or nothing."""
    parts = {f"{name}.{part}": t for name, found in trained.items() for part in _PARTS if (t := getattr(found, part)) is not None}
    final = _file(workdir)
    write_json(final.with_suffix(".json"), {name: dict(found.numbers) for name, found in trained.items()})
    keep_tensors(final, parts)


def read_trained(workdir: Path, name: str, scheme: Scheme) -> Quantized:
    """Codes and scales of a linear as `write_trained` kept them, on the CPU.

    Raises:
        ModelError: there are none, or they are of another scheme.
    """
    file = _file(workdir)
    kept, numbers = _opened(file, file.stat().st_mtime_ns if file.is_file() else 0)
    parts = {part: kept.read(full) for part in _PARTS if (full := f"{name}.{part}") in kept.tensors}
    grid = scheme.weights
    codes = parts.get("codes")
    if codes is None or codes.dim() != 2:
        raise ModelError(980, name, "has no codes among what training left", _HINT)
    shape = grid.scale_shape((codes.shape[0], codes.shape[1]))
    known = {"scale": (grid.scale_dtype, shape), "zero_point": ("I8", shape), "input_scale": ("F32", (1,)), "global_scale": ("F32", (1,))}
    for part, (dtype, wanted) in known.items():
        found = parts.get(part)
        needed = part == "scale" or (part == "zero_point" and not grid.symmetric)
        if (found is None and needed) or (found is not None and (dtype_name(found.dtype), tuple(found.shape)) != (dtype, wanted)):
            have = "nothing" if found is None else f"{dtype_name(found.dtype)} {list(found.shape)}"
            raise ModelError(981, f"{name}.{part}", f"is {have} where {scheme.name} needs {dtype} {list(wanted)}", _HINT)
    return Quantized(scheme, **parts, numbers=numbers[name])  # type: ignore[arg-type]


def _file(workdir: Path) -> Path:
    return workdir / "trained.safetensors"


@lru_cache(maxsize=1)
def _opened(file: Path, changed: int) -> tuple[Checkpoint, dict[str, Any]]:
    """The file's headers and numbers, read once for all linears.

    Args:
        changed: when it was written, so that another run's is not taken for it.
    """
    if not file.is_file():
        raise ModelError(982, str(file), "is missing: no step has trained these linears", _HINT)
    return Checkpoint(file.parent, {}, read_header(file)), read_json(file.with_suffix(".json"), 1 << 30)
