"""In which order steps may stand, and what training needs of the model: checked from headers, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .adapters import bias_keys
from .errors import PlanError
from .passes import ModelPass, Pass, RuntimePass, SourcePass, TrainedPass, WeightPass
from .source import compute_dtype
from .trained_source import TrainedSource

if TYPE_CHECKING:
    from .adapters.base import Description, Site
    from .plan import Step
    from .recipe import Recipe
    from .source import Source


def check_order(recipe: Recipe, passes: Sequence[Pass]) -> None:
    """Whether each step may stand where it does.

    Raises:
        PlanError: it may not, or there is none.
    """
    if not passes:
        raise PlanError(3, recipe.where("steps"), "no step to run")
    ids = [p.id for p in passes]
    training = [i for i, p in enumerate(passes) if isinstance(p, ModelPass)]
    for i, pass_ in enumerate(passes):
        where, earlier = recipe.where(f"steps[{i}]"), passes[:i]
        for needed in sorted(pass_.requires - set(ids[:i])):
            raise PlanError(4, where, f"{pass_.id} needs {needed} in an earlier step")
        twice = set(ids[:i]) & {pass_.id} if isinstance(pass_, RuntimePass) else set()
        for clash in sorted(pass_.conflicts & set(ids) | twice):
            raise PlanError(5, where, f"{pass_.id} and {clash} exclude each other")
        if isinstance(pass_, ModelPass) and any(isinstance(p, WeightPass) and not isinstance(p, TrainedPass) for p in earlier):
            raise PlanError(6, where, f"{pass_.id} trains the whole model, so it must come before the steps that rewrite weights")
        if isinstance(pass_, TrainedPass) and not any(index > i for index in training):
            raise PlanError(980, where, f"{pass_.id} says how linears round while they are trained, and no later step trains", "add distill.qad after it")
        if isinstance(pass_, SourcePass) and any(isinstance(p, WeightPass) for p in earlier):
            raise PlanError(241, where, f"{pass_.id} changes what every other step reads", "put it before the steps that treat weights")
        if isinstance(pass_, SourcePass) and training and training[0] < i < training[-1]:
            raise PlanError(981, where, f"{pass_.id} changes how the model is read, between steps that train it", "put it before or after all of them")
        if not isinstance(pass_, WeightPass) and (recipe.steps[i].targets is not None or recipe.steps[i].ignore):
            raise PlanError(242, where, f"{pass_.id} treats the model as a whole", "drop `targets` and `ignore`")


def after_training(recipe: Recipe, steps: Sequence[Step], source: Source, description: Description) -> Source:
    """The source as it will be once the recipe's steps have trained it; as it is if none does, or all have.

    Raises:
        PlanError: a linear cannot be trained as its step asks.
    """
    rounded = {site.name: step for step in steps if isinstance(step.pass_, TrainedPass) for site in step.sites}
    for step in steps:
        where, pass_ = recipe.where(f"steps[{step.index}]"), step.pass_
        for site in step.sites:
            if isinstance(pass_, TrainedPass):
                _check_site(site, where, source, description)
            elif site.name in rounded and isinstance(pass_, WeightPass) and not pass_.cache:
                by = rounded[site.name].pass_.id
                raise PlanError(982, where, f"{pass_.id} would change {site.name}, whose codes {by} has trained", "give the steps disjoint `targets`")
    if source.trained or not any(isinstance(step.pass_, ModelPass) for step in steps):
        return source
    biases: dict[str, str] = {}
    settings: dict[str, bool] = {}
    for step in steps:
        if isinstance(step.pass_, TrainedPass) and step.pass_.adds_bias:
            for key in _keys(recipe.where(f"steps[{step.index}]"), step, source, description):
                settings[key] = True
                roles = bias_keys(description.layout, source.config)[key]
                names = [f"{s.name}.bias" for s in description.sites if s.role in roles and s.layer is not None]
                biases.update({name: biases.get(name, step.pass_.id) for name in names if name not in source.dtypes})
    return TrainedSource(source, description, biases, settings)


def training_bytes(steps: Sequence[Step], source: Source) -> tuple[int, int]:
    """About what training takes: of memory, without activations, and of disk beside the trained model.

    Weights and a teacher as stored; of what is trained gradients, and in fp32 gradients, masters and two moments. On the disk two states of a
    training, one of them being written, and the best weights.
    """
    weights = {name: math.prod(source.shapes[name]) for name in source.trained}
    trained = 0
    for i, step in enumerate(steps):
        if isinstance(step.pass_, ModelPass):
            rounded = [(s.pass_, s.sites) for s in steps[:i] if isinstance(s.pass_, TrainedPass)]
            trained = max(trained, step.pass_.trained_weights(rounded, weights))
    stored = sum(map(source.nbytes, source.trained))
    width = -(-stored // max(1, sum(weights.values())))
    return stored * (2 if trained else 1) + (width + 16) * trained, (2 * 12 + width) * trained


def _check_site(site: Site, where: str, source: Source, description: Description) -> None:
    if site.expert is not None:
        raise PlanError(983, where, f"{site.name} is one of the routed experts, which transformers trains in one tensor", "ignore: [experts]")
    if site.layer is None and (site.role != "head" or source.is_tied):
        what = "is the embedding's own weight" if site.role == "head" else "lies outside the decoder layers"
        raise PlanError(984, where, f"{site.name} {what}, and cannot round by itself", "add it to `ignore`")
    computed = compute_dtype(source, description)
    if site.dtype != computed:
        raise PlanError(985, where, f"{site.name} is stored in {site.dtype}, and the model is trained in {computed}", "add it to `ignore`")


def _keys(where: str, step: Step, source: Source, description: Description) -> list[str]:
    """Keys of config.json that give the linears of a step their biases."""
    found: dict[str, None] = {}
    for site in step.sites:
        keys = [key for key, roles in bias_keys(description.layout, source.config).items() if site.role in roles]
        if not keys and f"{site.name}.bias" not in source.dtypes:
            raise PlanError(
                986,
                where,
                f"{step.pass_.id} gives {site.name} a bias, for which this architecture has no place",
                "give targets that have one, or options without a bias (quant.tequila: reactivation: 0)",
            )
        found.update(dict.fromkeys(keys))
    return list(found)
