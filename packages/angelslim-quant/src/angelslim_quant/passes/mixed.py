"""Mixed precision: each linear gets the scheme that costs least, all of them together a given number of bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from angelslim_core.errors import PlanError
from angelslim_core.passes import LayerPass, PassConfig, WeightPass

from ..candidates import CANDIDATES, Candidate, CandidateConfig, Unit, units_of
from ..measured import Sensitivity, UnitEntry, model_digest, read_sensitivity
from ..stages import by_input, stages
from .gptaq import GPTAQ
from .gptq import GPTQ

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Site
    from angelslim_core.context import Context
    from angelslim_core.layer import Layer
    from angelslim_core.schemes import Scheme
    from angelslim_core.source import Source

    from ..numerics.knapsack import Knapsack

# points of the curve of budgets
POINTS = 40


class _Choice(NamedTuple):
    """What was chosen: an index of a candidate for each unit."""

    units: list[Unit]
    knapsack: Knapsack
    chosen: list[int]

    @property
    def weights(self) -> int:
        return sum(unit.weights for unit in self.units)

    def bits(self, chosen: Sequence[int]) -> float:
        """Bits a weight with these candidates."""
        return sum(costs[i] for costs, i in zip(self.knapsack.costs, chosen, strict=True)) / self.weights

    def loss(self, chosen: Sequence[int]) -> float:
        """Nats a token with these candidates."""
        return sum(losses[i] for losses, i in zip(self.knapsack.losses, chosen, strict=True))


class Mixed(LayerPass):
    """Mixed precision: of several schemes each linear gets one, so that KL is least within a budget of bits a weight.

    What each scheme would cost each linear is measured to second order on calibration samples before the sweep, or read
    from a file of `angelslim quant sensitivity`. Linears that engines run as one matmul, and the experts of a layer, get
    the same scheme.
    """

    id = "quant.mixed"

    class Config(CandidateConfig):
        bits: float = Field(4.5, gt=0, le=64, description="Most bits a weight, on average over the step's linears, scales and zero points included.")
        candidates: tuple[Candidate, ...] = Field(
            ("int4", "int8a16", "keep"),
            min_length=1,
            description="Schemes to choose from: weight-only integers in groups, `int8` and `fp8` with activations, or the weight as it is.",
        )
        sensitivity: Path | None = Field(None, description="File of `angelslim quant sensitivity`; measured by the run if not given.")
        samples: int = Field(32, ge=1, description="Calibration samples to measure on, at most; half of them serve to quantize on trial.")

    def __init__(self, config: PassConfig | None = None, measured: Sensitivity | None = None) -> None:
        super().__init__(config)
        self._measured = measured
        self._passes: dict[str, WeightPass | None] = {name: CANDIDATES[name](self.config) for name in dict.fromkeys(self.config.candidates)}
        self._choice: _Choice | None = None
        self._chosen: dict[str, WeightPass | None] = {}

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        """What this step gives its final form."""
        return frozenset({"linear.weight"}).union(*(pass_.claims for pass_ in self._passes.values() if pass_))

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether the unchanged model's activations are read."""
        return any(isinstance(pass_, GPTAQ) for pass_ in self._passes.values())

    def settle(self, sites: Sequence[Site], source: Source) -> WeightPass:
        from ..numerics.knapsack import Knapsack

        for site in sites:
            if site.layer is None:
                raise PlanError(340, site.name, f"is outside the decoder layers, where {self.id} measures nothing", "take it out of `targets`")
        path: Path | None = self.config.sensitivity
        measured = self._measured
        if path:
            measured = read_sensitivity(path)
            measured.check(path.name, source, self.config)
        settled, units = type(self)(self.config, measured), units_of(sites)
        costs = [[unit.bits(pass_) for pass_ in self._passes.values()] for unit in units]
        if measured:
            losses = [measured.losses(path.name if path else self.id, unit, list(self._passes)) for unit in units]
        else:  # an error falls to a quarter with each bit, the same for all
            losses = [[unit.weights * 4 ** -(cost / unit.weights) for cost in row] for unit, row in zip(units, costs, strict=True)]
        knapsack, weights = Knapsack(costs, losses), sum(unit.weights for unit in units)
        budget = math.floor(self.config.bits * weights)
        if budget < knapsack.lowest:
            least = math.ceil(knapsack.lowest / weights * 1e4) / 1e4
            raise PlanError(
                341,
                self.id,
                f"{self.config.bits:g} bits a weight are too few: the cheapest candidates take {least:.4f}",
                "raise `bits`, or add a candidate of fewer",
            )
        settled._choice = _Choice(units, knapsack, knapsack.choose(budget))
        passes = list(self._passes.values())
        settled._chosen = {site.name: passes[i] for unit, i in zip(units, settled._choice.chosen, strict=True) for site in unit.sites}
        return settled

    def open_questions(self) -> list[str]:
        if self._measured:
            return []
        return [
            f"{self.id}: which linear gets which candidate is decided by measuring; these bytes are those of one choice within {self.config.bits:g} bits a weight"
        ]

    def scheme(self, site: Site) -> Scheme | None:
        pass_ = self._chosen.get(site.name)
        return pass_.scheme(site) if pass_ else None

    def measure(self, sites: Sequence[Site], context: Context) -> LayerPass:
        return self if self._measured or not sites else type(self)(self.config, self.sensitivities(sites, context))

    def sensitivities(self, sites: Sequence[Site], context: Context) -> Sensitivity:
        """What each candidate would cost each unit, measured on calibration samples."""
        from ..sensitivity import measure

        assert context.samples is not None
        units, samples = units_of(sites), min(self.config.samples, len(context.samples.ids))
        found = measure(context, units, self._passes, samples)
        entries = {unit.name: UnitEntry(linears=[site.name for site in unit.sites], kl=found.losses[unit.name]) for unit in units}
        return Sensitivity(
            model=model_digest(context.source), group_size=self.config.group_size, symmetric=self.config.symmetric,
            samples=samples, tokens=found.tokens, seed=context.seed, units=entries,
        )  # fmt: skip

    def run(self, layer: Layer) -> dict[str, Any]:
        from angelslim_core.sweep import run_on_layer

        report = {"hessian_dampings_raised": 0, "experts_rounded_to_nearest": 0}
        # what is collected does not depend on the bits
        collector = GPTAQ() if self.needs_reference else GPTQ()
        with collector.on(layer):
            for stage in stages(layer.sites, sequential=True):
                compensated = tuple(site for site in stage if isinstance(self._chosen[site.name], GPTQ))
                moments = collector.collect(layer, compensated) if compensated else {}
                for members in by_input(stage):
                    pass_ = self._chosen[members[0].name]
                    if isinstance(pass_, GPTQ):
                        pass_.solve(layer, members, moments[members[0]], report)
                    elif pass_:
                        layer.sites = tuple(members)
                        run_on_layer(pass_, layer)
        return report

    def findings(self, linears: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        if self._choice is None or not self._choice.units:
            return {}
        choice, names = self._choice, list(self._passes)
        knapsack, weights = choice.knapsack, choice.weights
        budgets = [knapsack.lowest + (knapsack.highest - knapsack.lowest) * i // (POINTS - 1) for i in range(POINTS)]
        mark = [round(choice.bits(choice.chosen), 4), choice.loss(choice.chosen)]
        counts = Counter(names[i] for unit, i in zip(choice.units, choice.chosen, strict=True) for _ in unit.sites)
        return {
            "bits_per_weight": mark[0],
            "predicted_kl": mark[1],
            **{f"linears_{name}": counts[name] for name in names},
            "uniform": [{"scheme": n, "bits_per_weight": choice.bits([i] * len(choice.units)), "predicted_kl": choice.loss([i] * len(choice.units))} for i, n in enumerate(names)],
            "units": [
                {"unit": unit.name, "scheme": names[i], "bits_per_weight": costs[i] / unit.weights, "kl": dict(zip(names, losses, strict=True))}
                for unit, i, costs, losses in zip(choice.units, choice.chosen, knapsack.costs, knapsack.losses, strict=True)
            ],
            "curves": [
                {
                    "title": "Least predicted KL within a budget", "x": "bits a weight, with scales and zero points", "y": "predicted KL, nats a token",
                    "points": [[b / weights, knapsack.loss(b)] for b in budgets], "mark": mark,
                }
            ],
        }  # fmt: skip
