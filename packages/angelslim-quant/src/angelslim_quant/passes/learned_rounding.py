"""Learned rounding: whether each weight rounds up or down, and each group's range, trained on the layer's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.layer import joined
from angelslim_core.schemes import Quantized

from ..sinks import token_weights
from .gptaq import GPTAQ
from .gptq import SHRINKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from angelslim_core.adapters.base import Site
    from angelslim_core.layer import Layer, LayerBatch
    from angelslim_core.schemes import Grid


class LearnedRounding(GPTAQ):
    """INT4 weights in groups, roundings and ranges trained on each layer's output, started from GPTAQ's."""

    id = "quant.learned_rounding"

    class Config(GPTAQ.Config):
        iterations: int = Field(200, ge=1, description="Steps per layer.")
        rate: float = Field(0.005, gt=0, le=1, description="Adam's first step in code units, a tenth of it for the factor of a scale; both fall to 0 linearly.")
        batch_size: int = Field(8, ge=1, description="Samples a step.")
        start: Literal["gptaq", "nearest"] = Field("gptaq", description="What training starts from.")

    def run(self, layer: Layer) -> dict[str, Any]:
        self._before: dict[Site, Tensor] = {}
        try:
            report = super().run(layer) if self.config.start == "gptaq" else self._start_nearest(layer)
            return {**report, **self._train(layer)}
        finally:
            del self._before

    def finish(self, layer: Layer, site: Site, result: Quantized, before_OI: Tensor) -> None:
        super().finish(layer, site, result, before_OI)
        self._before[site] = before_OI

    def _start_nearest(self, layer: Layer) -> dict[str, Any]:
        from ..numerics.integer import quantize, search_range

        for site in layer.sites:
            weight, scheme = layer.linear(site).weight.data, self.scheme(site)
            chosen = search_range(weight, scheme.weights, weight.new_ones(weight.shape[1]).float(), SHRINKS) if self.config.scale_search else (None, None)
            self.finish(layer, site, Quantized(scheme, *quantize(weight, scheme.weights, *chosen)), weight.float())
        return {}

    def _train(self, layer: Layer) -> dict[str, Any]:
        import torch

        group = layer.context.group
        own = {(batch.number, i): (batch, row) for batch in layer.batches for i, (batch, row) in enumerate(batch.rows())}
        found = group.gather([[*place, batch.mask.shape[0] if row is None else 1] for place, (batch, row) in own.items()])
        sizes = {(number, i): size for number, i, size in sorted(entry for part in found for entry in part)}
        started = self._loss_over(layer)
        rounders = {site: Rounder(self._before[site], layer.quantized[site][0]) for site in layer.sites}
        rate, iterations = self.config.rate, self.config.iterations
        shifts, factors = [r.shift for r in rounders.values()], [r.factor for r in rounders.values()]
        adam = torch.optim.Adam([{"params": shifts, "lr": rate}, {"params": factors, "lr": rate / 10}], betas=(0.9, 0.95))
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / iterations)
        generator = torch.Generator().manual_seed(self.context_seed(layer))
        with torch.enable_grad():
            for _ in range(iterations):
                layer.context.check_stop(f"layer {layer.index}")
                weights = {f"{layer.inner(s)}.weight": r.weight().to(layer.linear(s).weight.dtype) for s, r in rounders.items()}
                leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
                drawn = _draw(sizes, self.config.batch_size, generator)
                for batch in joined((own[place] for place in drawn if place in own), layer.context.device):
                    self._loss(layer, batch, leaves).backward()
                # an expert no token reached has none
                grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
                torch.autograd.backward(list(weights.values()), [group.reduce(g.float()).to(g.dtype) for g in grads])
                adam.step()
                falling.step()
                adam.zero_grad()
                for rounder in rounders.values():
                    rounder.clamp()
        kept = {site: layer.quantized[site][0] for site in layer.sites}
        for site, rounder in rounders.items():
            layer.store(site, rounder.result())
        ended = self._loss_over(layer)
        if not ended < started:  # NaN included
            layer.context.warnings.append(f"layer {layer.index}: training did not lower the error, its start is kept")
            for site, result in kept.items():
                layer.store(site, result)
            ended = started
        return {"start_loss": started, "loss": ended}

    def _loss(self, layer: Layer, batch: LayerBatch, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Weighted sum over real tokens of the output's squared error relative to the token's mean square."""
        assert batch.target is not None
        out = layer.forward(batch, weights=weights)
        mask = batch.mask.to(out.device)
        target = batch.target.to(out.device).float()[mask]
        error = (out.float()[mask] - target).square().mean(-1) / target.square().mean(-1).clamp_min(1e-12)
        weight_N = token_weights(batch, self.config.sink_weight)
        return error.sum() if weight_N is None else error @ weight_N.to(error.device)

    def _loss_over(self, layer: Layer) -> float:
        """Mean over the real tokens of all batches."""
        import torch

        with torch.no_grad():
            loss = sum(float(self._loss(layer, batch)) for batch in layer.batches)
        sums = torch.tensor([loss, sum(int(batch.mask.sum()) for batch in layer.batches)], dtype=torch.float64)
        total, tokens = layer.context.group.reduce(sums).tolist()
        return float(total / tokens)

    @staticmethod
    def context_seed(layer: Layer) -> int:
        """Every layer draws its own batches, also when a run is resumed."""
        return layer.context.seed * 100_003 + layer.index


class Rounder:
    """Trainable rounding of one weight: code = round(w / (m s) + v), v in [-.5, .5], m in [.5, 1.5] the factor of each group's scale.

    Args:
        before_OI: what is rounded, fp32.
        start: codes, scales and zero points to start from; training sees its scales as they are stored.
    """

    def __init__(self, before_OI: Tensor, start: Quantized) -> None:
        import torch

        self.start, self.grid = start, start.scheme.weights
        self._weight = before_OI
        self.shift = torch.zeros_like(before_OI).requires_grad_()
        self.factor = torch.ones_like(start.scale, dtype=torch.float32).requires_grad_()

    def clamp(self) -> None:
        """Bring v and m back into their ranges."""
        self.shift.data.clamp_(-0.5, 0.5)
        self.factor.data.clamp_(0.5, 1.5)

    def weight(self) -> Tensor:
        """The weight as it would be stored, [O, I] fp32; gradients pass straight through every rounding."""
        codes, scale = self._codes()
        return _spread(codes, scale, self.start.zero_point, self.grid)

    def result(self) -> Quantized:
        """What training ended with."""
        import torch

        with torch.no_grad():
            codes, scale = self._codes()
            return Quantized(self.start.scheme, codes.to(torch.int8), scale.to(self.start.scale.dtype), self.start.zero_point)

    def _codes(self) -> tuple[Tensor, Tensor]:
        from angelslim_core.schemes import against

        half = 1 << (self.grid.bits - 1)
        scale = _through(self.start.scale.float() * self.factor, lambda s: s.to(self.start.scale.dtype).float())
        values, scales = against(self._weight, scale, self.grid)
        codes = values / scales + against(self.shift, scale, self.grid)[0]
        if self.start.zero_point is not None:
            codes = codes + against(self._weight, self.start.zero_point.float(), self.grid)[1]
        return _through(codes, lambda c: c.round()).clamp(-half, half - 1).reshape(self._weight.shape), scale


def _through(x: Tensor, rounding: Any) -> Tensor:
    """rounding(x), with the gradient of x."""
    return x + (rounding(x) - x).detach()


def _spread(codes_OI: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    from angelslim_core.schemes import dequantize

    return dequantize(codes_OI, scale, zero_point, grid)


def _draw(sizes: Mapping[tuple[int, int], int], samples: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Parts of batches in random order until they hold that many samples; `sizes` says how many each has."""
    import torch

    places, drawn, held = list(sizes), [], 0
    for index in torch.randperm(len(places), generator=generator).tolist():
        drawn.append(places[index])
        held += sizes[places[index]]
        if held >= samples:
            break
    return drawn
