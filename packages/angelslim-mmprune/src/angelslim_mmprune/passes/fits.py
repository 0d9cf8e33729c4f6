"""Whether a model can be pruned as a recipe asks: its parts are looked up in a model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..models import Towers, media_of, towers

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Description
    from angelslim_core.plan import Plan


def towers_of(config: Mapping[str, Any], description: Description) -> Towers:
    """The parts of the model that transformers builds of a config.json, on the meta device.

    Raises:
        ModelError: its media are not known, or transformers builds it in another way.
    """
    import torch
    from transformers.initialization import no_init_weights

    from angelslim_core.model import auto_class, transformers_config

    made = transformers_config(description, config)
    media_of(made)
    with torch.device("meta"), no_init_weights():
        return towers(auto_class(made).from_config(made))


def check(plan: Plan) -> None:
    """
    Raises:
        PlanError: a step of this package does not fit the model.
    """
    from . import MediaPruning

    for step in plan.steps:
        if isinstance(step.pass_, MediaPruning):
            step.pass_.check(plan)
