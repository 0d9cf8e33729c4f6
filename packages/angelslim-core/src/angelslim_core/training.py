"""A step of training that does not know what it trains: fp32 master weights, a schedule, clipping, and states that go on exactly.

Whoever trains writes the loop, so that it may export, probe and stop where it likes:

    training = Training(dict(model.named_parameters()), options, group)
    training.resume(folder)
    while not training.is_done:
        training.advance(lambda step, part: terms_of(batch(step, part)))

With `Sharded` each process keeps and steps a share of the parameters only; states are the same, whoever wrote them.
Losses are sums and counts, so that means are taken over all processes: the same rows give the same step, however many share them.
Of everything random a step is the seed, so that a state needs no random numbers' state.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .errors import ModelError, NumericError, UsageError
from .io.checkpoint import TensorSpec, dtype_name, read_bytes, read_header, torch_dtype
from .io.strict_json import read_json
from .io.writer import ShardWriter, disk_errors, fsync_folder, spec_bytes, write_json
from .optimizers import Optimizers
from .parallel import Group

if TYPE_CHECKING:
    from .sharded import Sharded


# gradients that processes sum up at a time, in numbers
BUCKET = 1 << 26


class TrainingOptions(BaseModel):
    """How a training steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    lr: float = Field(default=1e-4, gt=0, description="highest learning rate")
    rates: dict[str, float] = Field(default_factory=dict, description="highest learning rate of parameters whose names contain a text, the first that does")
    warmup: float = Field(default=0.015, ge=0, le=1, description="share of the steps in which the rate rises to it; the first is above zero")
    final_lr: float = Field(default=0.0, ge=0, le=1, description="share of the rate at the end of the cosine")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices; norms and biases have none")
    undecayed: tuple[str, ...] = Field(default=(), description="parameters whose names contain one of these texts have no weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    clip: float = Field(default=0.5, gt=0, description="most that the norm of all gradients may be")
    accumulate: int = Field(default=1, ge=1, description="batches a step, each of which counts alike")
    seed: int = Field(default=0, ge=0)

    def highest(self, name: str) -> float:
        """Highest learning rate of a parameter."""
        return next((rate for text, rate in self.rates.items() if text in name), self.lr)

    def rate(self, step: int, highest: float | None = None) -> float:
        """Learning rate of a step, from 0, of parameters with that highest one."""
        highest = self.lr if highest is None else highest
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return highest * (step + 1) / warm
        part = (step - warm + 1) / max(1, self.steps - warm)
        return highest * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


@dataclass
class Terms:
    """loss = sum_s weights[s] * sums[s] / counts[s], counts being those of all processes.

    Args:
        sums: [S], fp32, with gradient.
        counts: [S], fp32.
        weights: [S], fp32.
        extra: [N], fp32: numbers to be summed over all processes, of which nothing is known here.
    """

    sums: Tensor
    counts: Tensor
    weights: Tensor
    extra: Tensor


@dataclass
class Seen:
    """What steps have shown since it was last asked.

    Args:
        loss: mean of the steps' losses.
        norm: largest norm of the gradients before clipping.
        extra: sums of `Terms.extra`.
    """

    loss: float
    norm: float
    extra: list[float]
    steps: int

    def joined(self, later: Seen) -> Seen:
        """Of these steps and later ones."""
        steps = self.steps + later.steps
        loss = (self.loss * self.steps + later.loss * later.steps) / steps
        return Seen(loss, max(self.norm, later.norm), [a + b for a, b in zip(self.extra, later.extra, strict=True)], steps)


class Training:
    """Parameters with fp32 copies and an optimizer's moments, and how far they are.

    Args:
        parameters: name -> parameter, of any floating dtype, or those of a `Sharded`; what is computed with them is theirs to say.
        group: the processes; each brings its own rows, all keep the whole state unless the parameters lie in parts.
        matrices: names of [O, I] that Muon steps, the others being AdamW's.

    Raises:
        UsageError: one of the matrices lies in parts, where no process sees it whole.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter] | Sharded, options: TrainingOptions, group: Group | None = None, matrices: Collection[str] = ()
    ) -> None:
        self.options, self.group, self.step = options, group or Group(), 0
        self._parts = None if isinstance(parameters, Mapping) else parameters
        named = parameters if isinstance(parameters, Mapping) else parameters.named_parameters()
        self._parameters: dict[str, Tensor] = {name: p for name, p in named.items() if p.requires_grad}
        self._divided = frozenset() if self._parts is None else self._parameters.keys() - self._parts.whole
        if apart := sorted(self._divided & frozenset(matrices)):
            raise UsageError(1121, "matrices", f"{apart[0]} lies in parts, and Muon steps whole matrices", "leave it to AdamW, or keep it whole")
        self._masters = {name: self._master(name, p) for name, p in self._parameters.items()}
        self._optimizers = Optimizers(self._masters, options, matrices)
        self._seen: list[Tensor] = []
        self._collected: dict[str, Tensor] = {}

    @property
    def is_done(self) -> bool:
        return self.step >= self.options.steps

    def advance(self, terms: Callable[[int, int], Terms]) -> None:
        """One step.

        Args:
            terms: terms(step, part) -> loss of this process's share of a batch; called `accumulate` times, with the random state seeded.
        """
        options, record = self.options, None
        for part in range(options.accumulate):
            torch.manual_seed(hash((options.seed, self.step, part, self.group.rank)) & 0x7FFF_FFFF_FFFF)
            found = terms(self.step, part)
            told = self.group.reduce(torch.cat([t.detach().float() for t in (found.counts, found.sums, found.extra)]))
            counts, sums, extra = told.split([len(found.counts), len(found.sums), len(found.extra)])
            mine, all_of = ((found.weights * part / counts.clamp(min=1) / options.accumulate).sum() for part in (found.sums.float(), sums))
            mine.backward()
            if options.accumulate > 1:
                self._collect()
            row = torch.cat((all_of[None], extra))
            record = row if record is None else record + row
        assert record is not None
        norm = self._update()
        self._seen.append(torch.cat((record, norm[None])))
        self.step += 1

    def _update(self) -> Tensor:
        """Move the masters, and the parameters after them; the norm of the gradients before clipping."""
        names = list(self._parameters)
        gradients = self._gradients(names)
        whole = [i for i, name in enumerate(names) if name not in self._divided]
        for bucket in _buckets(whole, gradients) if self.group.size > 1 else ():
            flat = self.group.reduce(torch.cat([gradients[i].reshape(-1) for i in bucket]))
            for i, part in zip(bucket, flat.split([gradients[i].numel() for i in bucket]), strict=True):
                gradients[i] = part.view_as(gradients[i])
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = torch.linalg.vector_norm(norms)
        if self._divided:
            parts = [i for i, name in enumerate(names) if name in self._divided]
            norm = (self.group.reduce(norms[parts].square().sum()) + norms[whole].square().sum()).sqrt()
        torch._foreach_mul_(gradients, (self.options.clip / norm.clamp(min=self.options.clip)))
        for name, gradient in zip(names, gradients, strict=True):
            self._masters[name].grad = gradient
            if self._masters[name] is not self._parameters[name]:
                self._parameters[name].grad = None
        self._optimizers.step(lambda highest: self.options.rate(self.step, highest))
        self._copy()
        return norm

    def _master(self, name: str, parameter: Tensor) -> nn.Parameter:
        """What is stepped: fp32, of all rows or this process's."""
        if self._parts is not None and name in self._divided:
            return nn.Parameter(self._parts.rows(parameter))
        return parameter if isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())

    def _collect(self) -> None:
        """Add gradients of a part to those before it in fp32: in 16 bits what is small beside their sum would be lost."""
        for name, p in self._parameters.items():
            if p.grad is None or p.grad.dtype == torch.float32:
                continue
            if name in self._collected:
                self._collected[name] += p.grad
            else:
                self._collected[name] = p.grad.float()
            p.grad = None

    @torch.no_grad()
    def _gradients(self, names: Sequence[str]) -> list[Tensor]:
        """In fp32, those of 16 bits widened together: a launch for each would be as many as there are parameters."""
        found = [self._gradient(name) for name in names]
        narrow = [i for i, gradient in enumerate(found) if gradient.dtype != torch.float32]
        if narrow:
            wide = [torch.empty_like(self._masters[names[i]]) for i in narrow]
            torch._foreach_copy_(wide, [found[i] for i in narrow])
            for i, gradient in zip(narrow, wide, strict=True):
                found[i] = gradient
        return found

    def _gradient(self, name: str) -> Tensor:
        found = self._collected.pop(name, self._parameters[name].grad)
        if found is not None and self._parts is not None and name in self._divided:
            found = self._parts.rows(found)
        return torch.zeros_like(self._masters[name], requires_grad=False) if found is None else found

    @torch.no_grad()
    def _copy(self) -> None:
        # masters of what lies in parts are the parameters' own memory
        pairs = [(p, self._masters[name]) for name, p in self._parameters.items() if self._masters[name] is not p and name not in self._divided]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def seen(self) -> Seen | None:
        """What the steps since the last call have shown; None: there were none. It waits for the device.

        Raises:
            NumericError: the loss or a gradient is not finite.
        """
        if not self._seen:
            return None
        rows = torch.stack(self._seen).double().cpu()
        self._seen = []
        if not bool(rows[:, [0, -1]].isfinite().all()):
            raise NumericError(20, f"step {self.step}", "the loss or a gradient is not finite", "lower the learning rate; an earlier state is kept")
        return Seen(float(rows[:, 0].mean()), float(rows[:, -1].max()), rows[:, 1:-1].sum(0).tolist(), len(rows))

    def save(self, folder: Path) -> None:
        """Keep the state, whole and durably, in place of earlier ones, after `seen` found it finite; the first process writes it."""
        if self.group.rank == 0:
            self._write(folder)
        elif self._parts is not None:
            for name, tensor in self._optimizers.state().items():
                self._whole(name, tensor)
        self.group.share(None)

    def _write(self, folder: Path) -> None:
        tensors = self._optimizers.state()
        specs = {name: TensorSpec(dtype_name(t.dtype), self._shape(name, t)) for name, t in tensors.items()}
        made = folder / f".step-{self.step:08d}.tmp"
        with disk_errors(folder, sum(map(spec_bytes, specs.values()))):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            writer = ShardWriter(made / "state.safetensors", specs)
            for name, tensor in tensors.items():
                writer.write(name, self._whole(name, tensor))
            writer.finish()
            write_json(made / "state.json", {"step": self.step, "options": self.options.model_dump(mode="json")})
            final = folder / f"step-{self.step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            os.replace(made, final)
            fsync_folder(folder)
        for earlier in _states(folder)[:-1]:
            shutil.rmtree(earlier, ignore_errors=True)

    def resume(self, folder: Path) -> bool:
        """Take up the last state that was kept; whether there is one.

        Raises:
            ModelError: it is of other parameters or options.
        """
        found = _states(folder)
        if not found:
            return False
        where, document = found[-1], read_json(found[-1] / "state.json")
        if document.get("options") != self.options.model_dump(mode="json"):
            raise ModelError(420, str(where), "is of a training with other options", "give the same options, or delete it")
        header = read_header(where / "state.safetensors")
        state = self._optimizers.state()
        if header.keys() != state.keys() or any(tuple(header[n].shape) != self._shape(n, t) for n, t in state.items()):
            raise ModelError(421, str(where), "is of a training of other parameters", "delete it to begin anew")
        with torch.no_grad():
            for name, tensor in state.items():
                info, dtype = header[name], torch_dtype(header[name].dtype)
                divided = self._parts is not None and _owner(name) in self._divided and tensor.ndim
                start = self._parts.first_row(_owner(name)) * math.prod(tensor.shape[1:]) if self._parts is not None and divided else 0
                tensor.copy_(read_bytes(info.file, info.offset + start * dtype.itemsize, tensor.numel() * dtype.itemsize).view(dtype).reshape(tensor.shape))
        self.step = int(document["step"])
        self._copy()
        return True

    def _shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """Shape of all rows of one of the state's tensors."""
        return tuple(self._parameters[_owner(name)].shape if tensor.ndim else tensor.shape)

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        return self._parts.whole_of(tensor, _owner(name)) if self._parts is not None and _owner(name) in self._divided and tensor.ndim else tensor


def _buckets(numbers: Sequence[int], gradients: Sequence[Tensor]) -> Iterator[list[int]]:
    """Consecutive gradients of together at most `BUCKET` numbers, or one: a copy of all of them would be as large as the fp32 weights."""
    found: list[int] = []
    size = 0
    for i in numbers:
        if found and size + gradients[i].numel() > BUCKET:
            yield found
            found, size = [], 0
        found.append(i)
        size += gradients[i].numel()
    if found:
        yield found


def _owner(name: str) -> str:
    """The parameter that one of the state's tensors is of."""
    return name.rpartition(".")[0]


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())
