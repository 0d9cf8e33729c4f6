"""How much the model's output moves when one unit is quantized, for every unit and candidate, one layer resident.

A small change d of a linear's output moves the distribution p over the next token by KL = E[(g d)^2] / 2 nats, where g is
the gradient of log p(y) in that output and y is drawn from p (the expectation is over y: it gives Fisher's information).
One sweep forward leaves the inputs of every layer on disk, one sweep backward carries g from the logits to the first
layer; d = x W^T - x' Q^T is computed at each linear, with x' the input as the scheme rounds it.

Errors at several tokens act on one output together, so g d is summed over tokens before it is squared. Summed over a
whole sample this is exact in expectation, but as noisy as there are few samples; summed over nothing it is half of the
truth. Blocks of tokens lie between: what errors at tokens of different blocks do together is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from angelslim_core.activations import Recording, Stored, stored
from angelslim_core.calibration.data import Samples
from angelslim_core.emulation import round_input
from angelslim_core.errors import NumericError
from angelslim_core.io.writer import write_json
from angelslim_core.layer import Layer, LayerBatch
from angelslim_core.model import Skeleton
from angelslim_core.stream import check_finite
from angelslim_core.sweep import capture, logits_of, run_on_layer

from .passes.gptq import GPTQ
from .stages import by_input

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context
    from angelslim_core.passes import WeightPass
    from angelslim_core.schemes import Quantized

    from .candidates import Unit

# rows of logits computed at once
ROWS = 256
# tokens whose errors are taken together
BLOCK = 8


class Measured(NamedTuple):
    """Nats a token by unit and candidate, and the number of tokens they are the mean of."""

    losses: dict[str, dict[str, float]]
    tokens: int


class Seen(NamedTuple):
    """A linear in one batch: inputs [N, I] and g [N, O], each row a token."""

    x_NI: Tensor
    g_NO: Tensor


class _Trial(Layer):
    """A layer that stays as it is: what passes store is kept beside it."""

    def store(self, site: Site, result: Quantized) -> None:
        self.quantized[site] = (result, self.linear(site).weight.data)


class _Kept:
    """What is finished, in a folder: hidden states by layer, a file for each process, and the losses.

    Attributes:
        layer: the one that was measured last; they are taken from the last to the first.
        losses: of that layer and those after it.
    """

    def __init__(self, context: Context) -> None:
        self._folder, self._rank = context.workdir / "measured", context.group.rank
        self._folder.mkdir(exist_ok=True)
        self._file = self._folder / "losses.json"
        nothing = {"layer": context.description.num_layers, "losses": {}}
        found = context.group.share(json.loads(self._file.read_text()) if self._file.is_file() else nothing)
        self.layer: int = found["layer"]
        self.losses: dict[str, dict[str, float]] = found["losses"]

    def finish(self, layer: int, losses: Mapping[str, dict[str, float]]) -> None:
        """Add a layer, and drop what only it needed."""
        self.layer, self.losses = layer, {**self.losses, **losses}
        if self._rank == 0:
            write_json(self._file, {"layer": layer, "losses": self.losses})
        for kind in ("inputs", "gradients"):
            self.path(kind, layer).unlink(missing_ok=True)

    def path(self, kind: str, layer: int) -> Path:
        """The file of a layer's `inputs`, or of the `gradients` in its outputs."""
        return self._folder / f"{kind}-{layer}-{self._rank}.safetensors"

    @contextmanager
    def writing(self, kind: str, layer: int, batches: Sequence[LayerBatch]) -> Iterator[Callable[[int, Tensor], None]]:
        """A function that writes what belongs to a batch, given its number: [B, T, H]."""
        recording = Recording(self.path(kind, layer), batches)
        yield lambda number, tensor: recording.add(number, tensor.cpu())
        if batches:
            recording.finish()

    def read(self, kind: str, layer: int, batches: Sequence[LayerBatch]) -> dict[int, Stored]:
        """Number of a batch -> what was written of it."""
        return stored([self.path(kind, layer)] if batches else [])


def measure(context: Context, units: Sequence[Unit], candidates: Mapping[str, WeightPass | None], num_samples: int) -> Measured:
    """KL of every unit and candidate, to second order.

    Where there are several samples, half of them serve to quantize and the others to measure: error compensation fits
    the tokens it sees. Finished layers are kept in the folder `measured` of the work folder, where a second call with
    the same arguments finds them.

    Args:
        units: of decoder layers.
        num_samples: of the calibration samples, at most.

    Raises:
        NumericError: an activation or gradient is not finite.
    """
    assert context.samples is not None
    ids = context.samples.ids[:num_samples]
    # fallbacks of trials are not the run's
    context = replace(context, samples=Samples(ids), batch_size=min(context.batch_size, max(1, len(ids) // 2)), warnings=[], fallbacks=[])
    # in this order processes have equal shares of both
    is_scored = [len(ids) == 1 or number % 4 in (1, 2) for number in range(-(-len(ids) // context.batch_size))]
    tokens = sum(len(sample) for i, sample in enumerate(ids) if is_scored[i // context.batch_size])
    of_layer: dict[int, list[Unit]] = {}
    for unit in units:
        of_layer.setdefault(unit.sites[0].layer or 0, []).append(unit)
    kept = _Kept(context)
    if kept.layer > min(of_layer):
        _measure_layers(context, of_layer, candidates, is_scored, kept)
    return Measured({unit.name: {name: loss / 2 / tokens for name, loss in kept.losses[unit.name].items()} for unit in units}, tokens)


def _measure_layers(
    context: Context, of_layer: Mapping[int, Sequence[Unit]], candidates: Mapping[str, WeightPass | None], is_scored: Sequence[bool], kept: _Kept
) -> None:
    """Sums over blocks of tokens of (g d)^2 into `kept`, from the last layer to the first that has a unit."""
    depth, group = context.description.num_layers, context.group
    skeleton = Skeleton(context.source, context.description)
    skeleton.fill_backbone(context.device)
    captured = capture(skeleton, context)
    scored = [b for b in captured[0] if is_scored[b.number]]
    if not all(group.gather(kept.path("gradients", kept.layer - 1).is_file() or not scored)):
        kept.layer, kept.losses = depth, {}
        _forward(skeleton, context, captured, kept)
        _gradients_of_outputs(skeleton, context, scored, kept)
    skeleton.drop_backbone()
    for index in reversed(range(min(of_layer), kept.layer)):
        context.check_stop(f"measuring layer {index}")
        layer, units = _load(skeleton, context, index, captured, kept), of_layer.get(index, ())
        scored = [b for b in layer.batches if is_scored[b.number]]
        layer.batches = [b for b in layer.batches if all(is_scored) or not is_scored[b.number]]
        layer.sites = tuple(site for unit in units for site in unit.sites)
        trials = _trials(layer, candidates)
        moved = torch.zeros(len(units), len(candidates), dtype=torch.float64, device=context.device)
        gradients = kept.read("gradients", index, scored)
        with kept.writing("gradients", index - 1, scored) as write:
            for batch in scored:
                before, seen = _backward(layer, batch, gradients[batch.number].read())
                write(batch.number, before)
                for i, unit in enumerate(units):
                    for j, trial in enumerate(trials):
                        moved[i, j] += sum(_moved(layer.linear(s).weight, trial[s], seen[s]) for s in unit.sites if s in trial and s in seen)
        moved = group.reduce(moved)
        if not bool(torch.isfinite(moved).all()):
            raise NumericError(290, f"layer {index}", "a gradient is not finite", "measure in a wider dtype, or check the model")
        kept.finish(index, {unit.name: dict(zip(candidates, row, strict=True)) for unit, row in zip(units, moved.tolist(), strict=True)})
        skeleton.drop_layer(index)
        captured[index] = []
        context.progress(2 * depth - index, 2 * depth, f"measuring layer {index}")


def _load(skeleton: Skeleton, context: Context, index: int, captured: Sequence[Sequence[LayerBatch]], kept: _Kept) -> _Trial:
    """A layer with its inputs."""
    module, prefix = skeleton.fill_layer(index, context.device), f"{context.description.block}.{index}."
    for name, tensor in module.state_dict().items():
        check_finite(prefix + name, tensor)
    inputs = kept.read("inputs", index, captured[index])
    for batch in captured[index]:
        batch.hidden = inputs[batch.number]
    return _Trial(index, module, prefix, captured[index], context)


def _forward(skeleton: Skeleton, context: Context, captured: Sequence[Sequence[LayerBatch]], kept: _Kept) -> None:
    """Write the inputs of every layer, and the outputs of the last as those of one more."""
    depth = len(captured)
    with kept.writing("inputs", 0, captured[0]) as write:
        for batch in captured[0]:
            write(batch.number, batch.hidden)
    for index in range(depth):
        context.check_stop(f"measuring layer {index}")
        layer = _load(skeleton, context, index, captured, kept)
        with torch.no_grad(), kept.writing("inputs", index + 1, layer.batches) as write:
            for batch in layer.batches:
                out = layer.forward(batch)
                check_finite(f"output of layer {index}", out)
                write(batch.number, out)
        skeleton.drop_layer(index)
        context.progress(index + 1, 2 * depth, f"inputs of layer {index + 1}")


def _gradients_of_outputs(skeleton: Skeleton, context: Context, batches: Sequence[LayerBatch], kept: _Kept) -> None:
    """Write the gradients of log p(y), summed over tokens, in the outputs of the last layer; y is drawn from p."""
    depth = context.description.num_layers
    skeleton.fill_head(context.device)
    outputs = kept.read("inputs", depth, batches)
    with kept.writing("gradients", depth - 1, batches) as write:
        for batch in batches:
            generator = torch.Generator().manual_seed((context.seed + batch.number) % 2**63)
            hidden_BTH = outputs[batch.number].read()
            gradient_BTH = torch.zeros_like(hidden_BTH)
            for places in batch.mask.nonzero().split(ROWS):
                rows = places.unbind(1)
                hidden = hidden_BTH[rows].to(context.device).requires_grad_()
                log_p = logits_of(skeleton, torch.zeros(len(hidden), dtype=torch.int64, device=context.device), hidden).float().log_softmax(-1)
                drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(context.device)
                (found,) = torch.autograd.grad(log_p.gather(1, drawn).sum(), hidden)
                gradient_BTH[rows] = found.cpu()
            write(batch.number, gradient_BTH)
    skeleton.model.get_output_embeddings().to("meta")


def _trials(layer: _Trial, candidates: Mapping[str, WeightPass | None]) -> list[dict[Site, Quantized]]:
    """What each candidate makes of the layer's sites; nothing where it keeps them."""
    moments = GPTQ().collect(layer, layer.sites) if any(isinstance(p, GPTQ) for p in candidates.values()) else {}
    trials = []
    for pass_ in candidates.values():
        layer.quantized = {}
        if isinstance(pass_, GPTQ):
            for members in by_input(layer.sites):
                pass_.solve(layer, members, moments[members[0]], Counter())
        elif pass_ is not None:
            run_on_layer(pass_, layer)
        trials.append({site: result for site, (result, _) in layer.quantized.items()})
    return trials


def _backward(layer: Layer, batch: LayerBatch, gradient_BTH: Tensor) -> tuple[Tensor, dict[Site, Seen]]:
    """The gradient in the layer's inputs, and what its sites see."""
    device = layer.context.device
    seen: dict[Site, tuple[Tensor, Tensor]] = {}

    def look(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, out: seen.update({site: (args[0].detach(), out)})

    handles = [layer.linear(site).register_forward_hook(look(site)) for site in layer.sites]
    hidden = batch.hidden.to(device).requires_grad_()
    try:
        out = layer.forward(batch, hidden)
    finally:
        for handle in handles:
            handle.remove()
    before, *found = torch.autograd.grad(out, [hidden, *(out for _, out in seen.values())], gradient_BTH.to(device), allow_unused=True)
    used = {site: Seen(x.flatten(0, -2), g.flatten(0, -2)) for (site, (x, _)), g in zip(seen.items(), found, strict=True) if g is not None}
    return before, used


def _moved(weight_OI: Tensor, quantized: Quantized, seen: Seen) -> Tensor:
    """Sum over blocks of (g d)^2."""
    x, q, inputs = seen.x_NI.float(), quantized.dequantize(), quantized.scheme.input_activations
    d = x @ (q - weight_OI.float()).T if inputs is None else round_input(seen.x_NI, inputs).float() @ q.T - x @ weight_OI.float().T
    effect_N = (seen.g_NO.float() * d).sum(1).double()
    return nn.functional.pad(effect_N, (0, -effect_N.numel() % BLOCK)).view(-1, BLOCK).sum(1).square().sum()
