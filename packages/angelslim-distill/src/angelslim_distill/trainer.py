"""Training a student towards a teacher: steps of one loss over all processes, looks at held-out rows, and states that go on exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from angelslim_core import fake_quant
from angelslim_core.calibration.packing import Row
from angelslim_core.context import Progress, never, silent
from angelslim_core.errors import ModelError, RecipeError, StoppedError
from angelslim_core.io.strict_json import read_json
from angelslim_core.io.writer import write_json
from angelslim_core.model import decoder_layers
from angelslim_core.parallel import Group
from angelslim_core.products import products
from angelslim_core.training import Terms, Training, TrainingOptions

from .computing import Computing, Ways
from .data.rows import Source, moved
from .evaluation import Held, evaluate
from .heads import Reader
from .history import History, best_of, read_best, write_best
from .objective import Objective, Sums
from .parameters import QUANTIZER
from .targets import Batch, Teacher
from .teacher import ModelTeacher

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from transformers import PreTrainedModel

    from angelslim_core.sharded import Sharded

Keep = Literal["best", "last"]
_POINTS = 200  # of the curve of losses
SHOWN = 1 << 15  # tokens of the first batch that quantizers see before training, at most


@dataclass(frozen=True)
class Looks:
    """When a training is looked at, and on what.

    Args:
        rows: held out; none: nothing is measured, and the last state is what is left.
        every: steps between two looks, at each of which a state is kept that a killed training goes on with.
        batch: rows a process runs at once.
        keep: what is left at the end, the best state by KL to the teacher on these rows, or the last one.
        multiple: rows are padded to a multiple of it.
    """

    rows: Sequence[Row] = ()
    every: int = 100
    batch: int = 1
    keep: Keep = "best"
    multiple: int = 1


class DistillTraining:
    """A student that is being trained; its parameters that require gradients are.

    Args:
        model: on the device, in the dtype to compute with; its quantizers are fp32.
        matrices: names of those that Muon steps, the others being AdamW's.
        inputs: what decides the result beside the options, JSON; a state of other inputs is not gone on with.
        checkpointing: compute the layers' activations anew on the way back instead of keeping them.
        ways: how steps may be computed; a training that goes on may do otherwise.
        tell: told, a line each, what of `ways` was to be tried and cannot be done.
        in_parts: fp32 weights and moments, and the weights that are computed with, lie in parts over the processes, each layer gathered
            while it computes, and so does a teacher that is a model, which may come on the CPU; `model` has its weights only at looks and at
            the end. A training that goes on may do otherwise.

    Raises:
        RecipeError: no weights are trained that could lie in parts.
        UsageError: Muon is to step what lies in parts.
    """

    def __init__(
        self, model: PreTrainedModel, source: Source, teacher: Teacher, objective: Objective, options: TrainingOptions, looks: Looks, *,
        matrices: Collection[str] = (), group: Group | None = None, inputs: Mapping[str, Any] | None = None, checkpointing: bool = False,
        in_parts: bool = False, ways: Ways | None = None, tell: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.model, self.source, self.teacher, self.objective, self.looks = model, source, teacher, objective, looks
        self.group, self.inputs = group or Group(), dict(inputs or {})
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._reader = Reader(model)
        self._checkpoints = checkpointing
        self._show()
        self._parts = self._divided() if in_parts and self.group.size > 1 else None
        # layers that are gathered, or run again, on the way back round their own weights there
        linears = [] if checkpointing or self._parts is not None else list(fake_quant.placed(model).values())
        obstacle = "weights that lie in parts (shard) are computed with in the plain way alone" if self._parts is not None else ""
        obstacle = "layers that are run again on the way back (checkpointing) are so in the plain way alone" if checkpointing else obstacle
        self._ways = ways or Ways()
        self.computing = Computing(self._reader, teacher if objective.kd_weight else None, linears, self._ways, obstacle=obstacle, tell=tell)
        self.training = Training(self._parts or self.parameters, options, self.group, matrices)
        self.history = History()
        self._batches: list[Batch] = []
        self._counts = torch.zeros(0)

    def run(self, states: Path, progress: Progress = silent, stop_requested: Callable[[], bool] = never) -> History:
        """Train to the end, from the last state in a folder on; the model is left as it then is kept, in evaluation mode.

        Raises:
            StoppedError: it was asked to stop; its state is kept.
            NumericError: the loss, a gradient or a measure is not finite; the last state before is kept.
            RecipeError: a step has no token that counts, in no process.
        """
        training, device = self.training, self.model.device
        self._check_inputs(states)
        widened = nullcontext() if self._ways.compile is True else products(device.type)  # which no compiler follows
        with torch.random.fork_rng([device] if device.type == "cuda" else []), widened:
            try:
                if self._checkpoints:
                    self._computing.gradient_checkpointing_enable({"use_reentrant": False})
                self._begin(states)
                self._settle()
                self._loop(states, progress, stop_requested)
            finally:
                if self._checkpoints:
                    self._computing.gradient_checkpointing_disable()
                self.model.eval()
        if self._parts is not None:
            self._parts.gather()
        found = best_of(states)
        if self.looks.keep == "best" and found is not None and found[0] != training.step:
            read_best(states, found[0], self.parameters)
        return self.history

    @torch.no_grad()
    def _show(self) -> None:
        """Let quantizers that learn of their inputs see the same ones in all processes, of the whole first batch, before anything else is run."""
        if not fake_quant.quantizers(self.model):
            return
        own = self.source.batch(0, 0)
        positions = torch.arange(own.input_ids.shape[1]).expand_as(own.input_ids) if own.positions is None else own.positions
        shares = self.group.gather([own.input_ids.tolist(), positions.tolist(), own.positions is not None])
        # row j of process r is row j * size + r of the batch
        order = [(share, j) for j in range(max(len(share[0]) for share in shares)) for share in shares if j < len(share[0])]
        ids, positions = (pad_sequence([torch.tensor(share[i][j]) for share, j in order], batch_first=True) for i in range(2))
        ids, positions = (tensor[: max(1, SHOWN // ids.shape[1])] for tensor in (ids, positions))
        is_shared = any(share[2] for share in shares)
        self.model.train()
        self._reader(moved(Batch(ids, ids >= 0, ids, ids >= 0, [], positions if is_shared else None), self.model.device))
        self.model.eval()

    def _divided(self) -> Sharded:
        """A copy whose weights lie in parts; called, it gives what a batch sums up."""
        from angelslim_core.sharded import Sharded

        quantizers = [name for name in self.parameters if QUANTIZER in name]
        if len(quantizers) == len(self.parameters):
            raise RecipeError(918, "shard", "there are no weights to lie in parts, since only quantizers are trained", "leave it out")

        if isinstance(self.teacher, ModelTeacher):
            if self.teacher.model is self.model:
                raise RecipeError(1110, "shard", "the model is its own teacher, and has no weights while they lie in parts", "give a copy of it as teacher")
            self.teacher.divide(self.group, self.model.device)

        def call(part: Any, batch: Batch, target: Any) -> tuple[Tensor, Sums]:
            sums = self.objective.sums(self._reader(batch), target, batch)
            return sums.total, sums

        def layers(part: Any) -> nn.ModuleList:
            return decoder_layers(part, part.config.get_text_config().num_hidden_layers)[1]

        parts = Sharded(self.model, call, self.group, whole=[n for n, p in self.model.named_parameters() if QUANTIZER in n], units=layers)
        self._reader = Reader(cast("PreTrainedModel", parts.module))
        return parts

    @property
    def _computing(self) -> PreTrainedModel:
        """What steps compute with."""
        return self._reader.model

    @property
    def kept(self) -> dict[str, Any]:
        """The look at what is left of the training; empty: it was not looked at."""
        looks = self.history.looks
        if not looks:
            return {}
        return min(looks, key=lambda look: (look["kl"], look["step"])) if self.looks.keep == "best" else looks[-1]

    def _begin(self, states: Path) -> None:
        """Take up the last state; without one, look at what is to be trained."""
        training = self.training
        if training.resume(states):
            self.history = History.read(states, training.step)
            return
        if self.group.rank == 0:
            for earlier in states.glob("best*"):
                earlier.unlink()
        self.group.share(None)
        if self.looks.rows:
            self._look(states)

    def _settle(self) -> None:
        """Choose how steps are computed, on the rows of the next one."""
        step = self.training.step
        if not self.training.is_done:
            self._computing.train()
            fake_quant.set_progress(self._computing, step / self.training.options.steps)
            self.computing.settle(lambda: moved(self.source.batch(step, 0), self.model.device), self.group)

    def _loop(self, states: Path, progress: Progress, stop_requested: Callable[[], bool]) -> None:
        training, steps = self.training, self.training.options.steps
        interval, last, began = max(1, steps // _POINTS), 0.0, time.perf_counter()
        before, told = self.history.seconds, ""
        self._computing.train()
        while not training.is_done:
            fake_quant.set_progress(self._computing, training.step / steps)
            training.advance(self._terms)
            self._release()  # and not before: some losses read heads on the way back
            now = time.perf_counter()
            is_look = training.step % self.looks.every == 0 or training.is_done
            is_point = training.step % interval == 0 or training.is_done
            if is_look or is_point or now - last > 1:
                told, last = self._tell(is_point) or told, now
                self.history.seconds = before + now - began
                rate = self.history.tokens / max(self.history.seconds, 1e-9)
                progress(training.step, steps, f"{told}, {rate:.0f} tok/s")
            stops = bool(self.group.reduce(torch.tensor(float(stop_requested())), "max")) and not training.is_done
            if is_look or stops:
                self._tell(is_point)  # nothing that is not finite is kept
                if is_look and self.looks.rows:
                    pause = time.perf_counter()
                    told = self._look(states)
                    began += time.perf_counter() - pause
                if self.group.rank == 0:  # before the state that it is of: who is killed in between goes on from the one before
                    self.history.write(states, training.step)
                training.save(states)
                if self.group.rank == 0:
                    self.history.forget(states, training.step)
            if stops:
                raise StoppedError(910, "train", f"stopped as asked after step {training.step}; its state is kept", "run the same command again to go on")

    def _terms(self, step: int, part: int) -> Terms:
        """The loss of a part of a step, weighed so that every token of the step that counts does so alike, whatever part and process it is in."""
        options, objective = self.training.options, self.objective
        if part == 0:
            self._batches = [self.source.batch(step, i) for i in range(options.accumulate)]
            self._counts = self.group.reduce(torch.tensor([float(b.counted.sum()) for b in self._batches], dtype=torch.float64))
            if not float(self._counts.sum()):
                raise RecipeError(917, f"step {step + 1}", "has no token that counts, in none of its rows", "give more rows a batch, or count: all")
            self.history.tokens += int(self._counts.sum())
        batch = self._batches[part]
        own = float(batch.counted.sum())
        batch = moved(batch, self.model.device)
        if self._parts is not None:
            sums: Sums = self._parts(batch, self.teacher(batch) if objective.kd_weight else None)
        else:
            sums = objective.sums(*self.computing(batch), batch)
        share = options.accumulate * float(self._counts[part] / self._counts.sum())
        counts, weights = (torch.full((1,), number, device=sums.total.device) for number in (own, share))  # torch.tensor would wait for the device
        return Terms(sums.total[None], counts, weights, torch.stack((sums.kd, sums.lm)))

    def _tell(self, is_point: bool) -> str:
        """What the steps since the last call have shown, in a few words; waits for the device."""
        seen = self.training.seen()
        if seen is not None:
            self.history.add(seen.loss, seen.steps)
        if is_point:
            self.history.point(self.training.step)
        return "" if seen is None else f"loss {seen.loss:.4f}"

    def _release(self) -> None:
        if isinstance(self.teacher, ModelTeacher):
            self.teacher.release()

    def _look(self, states: Path) -> str:
        step, looks = self.training.step, self.looks
        if self._parts is not None:
            self._parts.gather()
        fake_quant.set_progress(self.model, step / self.training.options.steps)
        held: Held = evaluate(self.model, self.teacher, looks.rows, looks.batch, self.group, looks.multiple)
        self.history.looks.append({"step": step, **held.as_dict()})
        if self.group.rank == 0 and looks.keep == "best":
            best = best_of(states)
            if best is None or held.kl < best[1]:
                write_best(states, step, held.kl, self.parameters)
        self.group.share(None)
        self._release()
        if self._parts is not None:
            self._parts.release()
        return f"KL {held.kl:.4f}, ppl {held.perplexity:.2f}"

    def _check_inputs(self, states: Path) -> None:
        """
        Raises:
            ModelError: the folder holds states of a training on something else.
        """
        path = states / "inputs.json"
        if self.group.rank == 0:
            earlier = read_json(path) if path.is_file() else self.inputs
            differing = sorted(key for key in {*earlier, *self.inputs} if earlier.get(key) != self.inputs.get(key))
            if differing:
                raise ModelError(914, str(states), f"is of a training with another {', '.join(differing)}", "give the same, or delete it")
            states.mkdir(parents=True, exist_ok=True)
            write_json(path, self.inputs)
        self.group.share(None)
