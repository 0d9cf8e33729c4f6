"""Shared by the benchmarks of sparse attention's quality: one number a policy that sets its density, and the search for a density."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from angelslim_sparseattn import make_policy, select
from angelslim_sparseattn.config import SparseAttentionConfig

Inputs = Sequence[tuple[Tensor, Tensor, Tensor, float]]


# Stem by the attention that antidiagonals stand for, as xattention and cosa here
MASS: dict[str, Any] = {"score": "mass", "stride": 8}


@dataclass(frozen=True)
class Knob:
    """A policy whose density one number sets.

    Args:
        policy: its name.
        options: from a number in [0, 1] to the options that vary; density never falls as the number grows.
        fixed: the other options.
    """

    policy: str
    options: Callable[[float], Mapping[str, Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def at(self, t: float) -> dict[str, Any]:
        return {**self.fixed, **self.options(t)}


def knobs(length: int, block: int) -> dict[str, Knob]:
    """A knob for every policy, for prompts of `length` tokens; what is always kept is in proportion, 128 and 256 tokens at 8K."""
    local = lambda t: {"n_local": round(t * length / block) * block}  # noqa: E731
    first = {"n_init": length // 64}
    return {
        "a_shape": Knob("a_shape", local, first),
        "tri_shape": Knob("tri_shape", local, {**first, "n_last": length // 80}),
        "dilated": Knob("dilated", local, {**first, "stride": 8}),
        "minference": Knob("minference", lambda t: {"vertical": round(t * length / 2), "slash": round(t * length)}),
        "flexprefill": Knob("flexprefill", lambda t: {"gamma": t}, {"min_budget": block}),
        "xattention": Knob("xattention", lambda t: {"tau": t}, {"stride": 8}),
        "flashprefill": Knob("flashprefill", lambda t: {"alpha": 1e-6**t}, {**first, "n_local": length // 32, "n_last": length // 64}),
        "vecattention": Knob("vecattention", lambda t: {"theta": 1e-6**t}),
        # the skip while attention runs is off: what it skips is not seen in a density
        "cosa": Knob("cosa", lambda t: {"p": t}, {"delta": -1.0, "stride": 8}),
        "stem": stem(length),
        "uniform top-k": stem(length, alpha=1.0, lam=0.0),
        "stem mass": stem(length, **MASS),
        "uniform mass": stem(length, alpha=1.0, lam=0.0, **MASS),
        "stem share": stem_by_share(length),
        "uniform share": stem_by_share(length, alpha=1.0, lam=0.0),
    }


def stem(length: int, **fixed: Any) -> Knob:
    """Stem by its rate; uniform top-k is Stem without decay and without the values' term."""
    ours = {"alpha": 0.7, "lam": 0.2, "n_init": length // 64, "n_local": length // 32}
    return Knob("stem", lambda t: {"rate": max(1e-6, t)}, {**ours, **fixed})


def stem_by_share(length: int, alpha: float = 0.9, **fixed: Any) -> Knob:
    """Stem by the share of the mass that its first row keeps; the uniform one is XAttention with near blocks kept.

    The decay ends where it would keep a density from being reached.
    """
    ours = {"lam": 0.2, "n_init": length // 64, "n_local": length // 32, **MASS}
    return Knob("stem", lambda t: {"tau": max(1e-6, t), "alpha": max(alpha, 2 * t - 1)}, {**ours, **fixed})


def density(inputs: Inputs, policy: str, options: Mapping[str, Any], block: int) -> float:
    """Mean over these queries, keys and values of the density that a policy yields."""
    made = make_policy(policy, **options)
    return sum(select(q, k, v, made, scale=scale, block=block).density() for q, k, v, scale in inputs) / len(inputs)


@dataclass(frozen=True)
class Bracket:
    """Options just below and just above a density, and the densities they have; the same twice where one is closest to it."""

    below: tuple[dict[str, Any], float]
    above: tuple[dict[str, Any], float]


def at_density(inputs: Inputs, knob: Knob, block: int, target: float, *, close: float = 5e-4, steps: int = 14) -> Bracket:
    """The options of a knob next to a density on these inputs, by bisection.

    Raises:
        ValueError: the knob does not reach it.
    """
    low, high = 0.0, 1.0
    below, above = ((knob.at(t), density(inputs, knob.policy, knob.at(t), block)) for t in (low, high))
    if not below[1] <= target <= above[1]:
        raise ValueError(f"density reaches from {below[1]:.4f} to {above[1]:.4f}, not {target}")
    for _ in range(steps):
        middle = (low + high) / 2
        options = knob.at(middle)
        if options in (below[0], above[0]):
            break
        found = density(inputs, knob.policy, options, block)
        if abs(found - target) < close:
            return Bracket((options, found), (options, found))
        if found < target:
            low, below = middle, (options, found)
        else:
            high, above = middle, (options, found)
    return Bracket(below, above)


def configured(policy: str, options: Mapping[str, Any], block: int, dense_layers: Sequence[int] = (0, 1)) -> SparseAttentionConfig:
    """A whole model's configuration, however short the prompt."""
    return SparseAttentionConfig(policy=policy, options=dict(options), block=block, min_len=0, dense_layers=tuple(dense_layers))


def between(x: float, below: tuple[float, float], above: tuple[float, float]) -> float:
    """At x, on the line through two points; their mean value where both are at one place."""
    if below[0] == above[0]:
        return (below[1] + above[1]) / 2
    return below[1] + (x - below[0]) / (above[0] - below[0]) * (above[1] - below[1])
