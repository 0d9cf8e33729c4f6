"""Training quantizers block by block: a decoder block that rounds learns to make of what it will be fed what the unquantized one makes of its own inputs.

Per block, target = f(x) with the unquantized block f and the unquantized model's inputs x; the student is the rounding block on what the rounding blocks
before it yield, and its loss is their mean squared error over real tokens. The block is then frozen, and both streams go on through it.

Shapes: B samples, T tokens, H hidden size.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from angelslim_core.context import Context
from angelslim_core.device import to_host
from angelslim_core.errors import NumericError, RecipeError, UsageError
from angelslim_core.fake_cache import placed_caches
from angelslim_core.fake_quant import placed, quantizers, rounding_off, set_progress
from angelslim_core.layer import Layer, LayerBatch, joined
from angelslim_core.model import decoder_layers
from angelslim_core.sweep import capture
from angelslim_core.training import Terms, Training, TrainingOptions

from .kept_tensors import read_kept, write_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Sequence[tuple[LayerBatch, int | None]]


@dataclass(frozen=True)
class BlockOptions:
    """How each block is trained.

    Args:
        epochs: times that all samples are seen.
        batch: samples a step, over all processes.
        lr: highest rate of weights; `quantizer_lr`: of what quantizers learn; both fall along a cosine to `final_lr` of it.
        train: "auto" trains weights too, where the quantizer says that they are meant to be.
        relative: each token's error is divided by its target's mean square.
        held_out: share of the samples that the best epoch is chosen by instead of being trained on; 0: by those trained on.
    """

    epochs: int = 20
    batch: int = 1
    lr: float = 1e-3
    quantizer_lr: float = 1e-4
    final_lr: float = 0.05
    train: Literal["auto", "quantizers"] = "auto"
    relative: bool = True
    held_out: float = 0.1


@dataclass
class _Whole:
    """A whole model as `capture` wants it."""

    backbone: Any
    layers: nn.ModuleList


def train_blocks(model: PreTrainedModel, context: Context, options: BlockOptions) -> list[dict[str, Any]]:
    """Train the linears that round, block by block, on the run's calibration samples; blocks that are finished are kept in the work folder.

    Returns:
        for each block: `start_error` and `error`, mean errors over the tokens the epoch is chosen by, and the best `epoch`, 0 being its start.

    Raises:
        RecipeError: no linear of the model's blocks rounds.
        UsageError: the processes cannot share a batch evenly, or some of them have no sample.
        NumericError: a loss is not finite; blocks that were finished are kept.
        StoppedError: it was asked to stop.
    """
    path, layers = decoder_layers(model, context.description.num_layers)
    if not quantizers(layers):
        raise RecipeError(
            931, "distill.blockwise", "no linear of the model's blocks rounds, so there is nothing to train", "put a pass that trains quantizers before it"
        )
    if options.batch % context.group.size:
        what = f"{options.batch} samples a step cannot be shared by {context.group.size} processes"
        raise UsageError(933, "batch", what, "give a multiple of their number")
    assert context.samples is not None
    found_batches = -(-len(context.samples.ids) // context.batch_size)
    if found_batches < context.group.size:
        what = f"{found_batches} batches of samples leave some of {context.group.size} processes without any"
        raise UsageError(1111, "calibration", what, "give more samples, or a smaller batch_size")
    folder = context.workdir / "measured" / context.group.share(f"blockwise-{_digest(options, layers)}")
    captured = capture(_Whole(model.get_submodule(path.rpartition(".")[0]), layers), context)
    for batch in captured[0]:
        batch.fork()
    found = []
    with _frozen(model):
        for index, module in enumerate(layers):
            context.check_stop(f"block {index}")
            layer = Layer(index, module, f"{context.description.block}.{index}.", captured[index], context)
            found.append(_Block(layer, options).settle(folder / f"block-{index:05d}"))
            _go_on(layer, captured[index + 1] if index + 1 < len(layers) else [])
            context.progress(index + 1, len(layers), f"block {index}, error {found[-1]['start_error']:.3g} -> {found[-1]['error']:.3g}")
    return found


class _Block:
    """A block that is being trained; its targets are made first, since training changes its weights."""

    def __init__(self, layer: Layer, options: BlockOptions) -> None:
        self.layer, self.options, self.group = layer, options, layer.context.group
        self.module = layer.module.eval()
        linears = placed(self.module)
        # what several quantizers share, the scale of one input for instance, is one parameter
        learnt = {p for quantizer in quantizers(self.module).values() for p in quantizer.parameters()}
        self.parameters: dict[str, nn.Parameter] = {name: p for name, p in self.module.named_parameters() if p in learnt}
        if options.train == "auto":
            self.parameters |= {f"{name}.weight": cast("nn.Parameter", linear.weight) for name, linear in linears.items() if linear.quantizer.trains_weight}
        with torch.no_grad(), rounding_off(self.module):
            for batch in layer.batches:
                batch.target = to_host(layer.forward(batch, batch.reference))
        rows = [row for batch in layer.batches for row in batch.rows()]
        held = min(max(1, round(options.held_out * len(rows))), len(rows) - 1) if options.held_out else 0
        self.rows = rows[: len(rows) - held]
        has_held = bool(self.group.reduce(torch.tensor([held])).item())
        self.judges = rows[len(rows) - held :] if has_held else rows

    def settle(self, kept: Path) -> dict[str, Any]:
        """Train it, or take up what an earlier run trained."""
        numbers = self.group.share(read_kept(kept, self.parameters) if self.group.rank == 0 else None)
        if numbers is None:
            numbers = self._trained()
            if self.group.rank == 0:
                write_kept(kept, self.parameters, numbers)
            self.group.share(None)
        elif self.group.rank:
            read_kept(kept, self.parameters)
        return dict(numbers)

    def _trained(self) -> dict[str, Any]:
        options, own = self.options, self.options.batch // self.group.size
        self._show()
        start = lowest = self._judged()
        if not self.parameters:
            return {"start_error": start, "error": start, "epoch": 0}
        steps = -(-max(self.group.gather(len(self.rows))) // own)
        seed = self.layer.context.seed * 100_003 + self.layer.index
        for p in self.parameters.values():
            p.requires_grad_(True)
        stepping = TrainingOptions(
            steps=options.epochs * steps, lr=options.lr, rates={".quantizer.": options.quantizer_lr}, warmup=0, final_lr=options.final_lr, clip=1.0, seed=seed
        )  # fmt: skip
        training = Training(self.parameters, stepping, self.group)
        best, epoch_of_best = self._state(), 0
        for epoch in range(options.epochs):
            self.layer.context.check_stop(f"block {self.layer.index}, epoch {epoch}")
            order = random.Random(f"{seed}/{epoch}/{self.group.rank}").sample(self.rows, len(self.rows))
            self.module.train()
            for step in range(steps):
                set_progress(self.module, training.step / stepping.steps)
                part = [order[i % len(order)] for i in range(step * own, (step + 1) * own)]
                training.advance(lambda _, __, part=part: self._terms(part))  # type: ignore[misc]
            self.module.eval()
            self._seen(training, epoch)
            error = self._judged()
            if error < lowest:
                best, lowest, epoch_of_best = self._state(), error, epoch + 1
        set_progress(self.module, 1.0)
        for name, p in self.parameters.items():
            p.requires_grad_(False).copy_(best[name])
        if not epoch_of_best:
            self.layer.context.warnings.append(f"block {self.layer.index}: training did not lower the error, its start is kept")
        return {"start_error": start, "error": lowest, "epoch": epoch_of_best}

    @torch.no_grad()
    def _show(self) -> None:
        """Let quantizers that learn of their inputs see some, before anything else is run; what the first process's have learned is all processes'."""
        self.module.train()
        self._errors(self.rows[:1])
        self.module.eval()
        if self.group.size > 1:
            for quantizer in quantizers(self.module).values():
                for tensor in quantizer.state_dict().values():
                    tensor.copy_(self.group.reduce(tensor.float() * (self.group.rank == 0)))

    def _seen(self, training: Training, epoch: int) -> None:
        try:
            training.seen()
        except NumericError as error:
            hint = "lower lr and quantizer_lr"
            raise NumericError(931, f"block {self.layer.index}, epoch {epoch + 1}", error.what, hint) from error

    def _state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _terms(self, rows: Rows) -> Terms:
        sums, counts = self._errors(rows)
        return Terms(sums, counts, torch.ones_like(counts), counts.new_zeros(0))

    @torch.no_grad()
    def _judged(self) -> float:
        """Mean error over the tokens of all processes that the epoch is chosen by.

        Raises:
            NumericError: it is not finite.
        """
        totals = torch.zeros(2, dtype=torch.float64)
        for row in self.judges:
            totals += torch.cat(self._errors([row])).double().cpu()
        total, tokens = self.group.reduce(totals).tolist()
        if not total < float("inf"):
            raise NumericError(932, f"block {self.layer.index}", "its error is not finite", "lower lr and quantizer_lr, or evaluate the model")
        return float(total / tokens)

    def _errors(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """[1] each, fp32: sum over real tokens of the errors of the output, and their number."""
        device = self.layer.context.device
        total, tokens = torch.zeros(1, device=device), torch.zeros(1, device=device)
        for batch in joined(rows, device):
            mask = batch.mask.to(device)
            target = batch.target.to(device).float()[mask]
            error = (self.layer.forward(batch).float()[mask] - target).square().mean(-1)
            total = total + (error / target.square().mean(-1).clamp(min=1e-12) if self.options.relative else error).sum()
            tokens = tokens + mask.sum()
        return total, tokens


@torch.no_grad()
def _go_on(layer: Layer, following: Sequence[LayerBatch]) -> None:
    """Feed the next block what this one makes of both streams, and let go of this one's."""
    for position, batch in enumerate(layer.batches):
        if following:
            following[position].hidden, following[position].reference = to_host(layer.forward(batch)), batch.target
        batch.hidden = batch.reference = batch.target = None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter is trained but those that are said to be."""
    was = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for p, trains in was:
            p.requires_grad_(trains)


def _digest(options: BlockOptions, layers: nn.ModuleList) -> str:
    """Of the options and of what training begins with: two such steps of a recipe do not take each other's blocks."""
    found = hashlib.sha256(repr(asdict(options)).encode())
    for name, module in (placed(layers) | placed_caches(layers)).items():
        for p in module.parameters():
            found.update(f"{name} {p.double().sum().item()!r} {p.double().square().sum().item()!r}".encode())
    return found.hexdigest()[:16]
