"""Stages of strategies in the order in which a model comes to them, and what they did to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from angelslim_core.errors import PlanError, UsageError

from .budget import Scope
from .models import Towers, layer_number
from .plan import Grid
from .strategies.base import Modality, Stage, Strategy

# what has a meaning for causal attention
_OF_LANGUAGE = ("last_row", "received", "raw_keys", "hidden")


@dataclass(frozen=True)
class AppliedPool:
    """What a stage did to one pool.

    Args:
        positions: [n], columns of the prompt, padding included, of the tokens that the pool had before the stage.
        kept: [k], numbers in the pool, ascending, of those that stay.
        groups: [n]: which of the kept ones each token went into, -1 none; None: nothing was merged.
    """

    row: int
    modality: Modality
    grids: tuple[Grid, ...]
    positions: Tensor
    kept: Tensor
    groups: Tensor | None


@dataclass(frozen=True)
class Applied:
    """What a stage did to a prompt.

    Args:
        strategy: its name.
        before, after: tokens of each row, text included.
        numbers: [B, most], columns of the prompt, padding included, of the tokens that are left.
        real: [B, most], bool: which of these are tokens.
    """

    strategy: str
    stage: Stage
    before: tuple[int, ...]
    after: tuple[int, ...]
    numbers: Tensor
    real: Tensor
    pools: tuple[AppliedPool, ...]

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Of each row the columns of the tokens that are left, ascending."""
        return tuple(numbers[real] for numbers, real in zip(self.numbers, self.real, strict=True))


@dataclass(frozen=True)
class Step:
    """A stage of a strategy; layer -1 is before the first."""

    strategy: Strategy
    stage: Stage
    layer: int

    @property
    def pools(self) -> tuple[Scope, frozenset[Modality]]:
        return self.strategy.budget_scope, self.strategy.modalities

    @property
    def drops(self) -> bool:
        """Whether any token can go."""
        return self.strategy.keep_ratio != 1 or self.stage.share is not None


def steps_of(towers: Towers, strategies: Sequence[Strategy]) -> list[Step]:
    """Of strategies as they are for a model of this depth.

    Raises:
        PlanError: a model cannot do what a strategy asks for.
        UsageError: no strategy, or a layer that there is not.
    """
    if not strategies:
        raise UsageError(820, "strategy", "none is given")
    strategies = [strategy.at_depth(len(towers.layers)) for strategy in strategies]
    steps = [Step(strategy, stage, _layer_of(towers, strategy, stage)) for strategy in strategies for stage in strategy.stages]
    for strategy in strategies:
        if not strategy.modalities & towers.modalities:
            raise PlanError(
                821, strategy.name, f"chooses among {' and '.join(sorted(strategy.modalities))} tokens, and {type(towers.config).__name__} has none"
            )
        last = max(step.layer for step in steps if step.strategy is strategy)
        for need in strategy.needs:
            layer = towers.layer_of(need, f"{strategy.name}.{need.source}")
            if need.source == "llm" and (layer > last or need.statistic not in _OF_LANGUAGE):
                raise PlanError(822, strategy.name, f"{need.statistic} of the language model's layer {layer} is not there behind layer {last}")
    return sorted(steps, key=lambda step: step.layer)


def _layer_of(towers: Towers, strategy: Strategy, stage: Stage) -> int:
    if stage.layer is None:
        return -1
    layer = layer_number(stage.layer, len(towers.layers), f"{strategy.name}.layer")
    if strategy.merges:
        raise PlanError(823, strategy.name, "merges tokens, which is possible before the language model's first layer only")
    if layer == len(towers.layers) - 1:
        raise PlanError(824, f"{strategy.name}.layer", f"nothing comes behind layer {layer}", f"the last that is of use is {layer - 1}")
    if layer < towers.first_free:
        raise PlanError(825, f"{strategy.name}.layer", f"behind layer {layer} features of the encoder are still added; the least is {towers.first_free}")
    return layer
