"""Runtime passes: one a strategy, whose options are the pass's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import ValidationError

from angelslim_core.errors import AngelslimError, ModelError, PlanError
from angelslim_core.passes import PassConfig, RuntimePass

from ..strategies import CLASSES, strategy_class

if TYPE_CHECKING:
    from torch.nn import Module

    from angelslim_core.context import Context
    from angelslim_core.plan import Plan

    from ..strategies.base import Strategy

# folder of an artifact under which each option that names files has a folder of its own
FOLDER = "mmprune"


class MediaPruning(RuntimePass):
    """Base of the passes: leaves a strategy's options, and the files that they name, which `load` attaches to the model."""

    name: ClassVar[str]

    def check(self, plan: Plan) -> None:
        """What can be known before any work.

        Raises:
            PlanError: the model has no such media, or not the layers that are asked for, or its code of transformers is another one.
        """
        from ..steps import steps_of
        from .fits import towers_of

        where = plan.recipe.where(f"steps[{next(s.index for s in plan.steps if s.pass_ is self)}]")
        try:
            parts = towers_of(plan.source.config, plan.description)
            steps_of(parts, [self.config])
            for option in scorers_of(type(self.config)):
                if (folder := getattr(self.config, option)) is not None:
                    _check_scorer(folder, parts.language)
        except AngelslimError as error:
            raise PlanError(880, where, f"{self.id}: {error.where}: {error.what}", error.hint) from error

    def policy(self, context: Context) -> Mapping[str, Any]:
        found: dict[str, Any] = self.config.model_dump(mode="json")
        return found | {option: option for option in scorers_of(type(self.config)) if found[option] is not None}

    def leave(self, folder: Path) -> None:
        from ..scorer import load_scorer, save_scorer

        for option in scorers_of(type(self.config)):
            if (given := getattr(self.config, option)) is not None:
                (folder / FOLDER).mkdir(exist_ok=True)
                save_scorer(load_scorer(given), folder / FOLDER / option, replace=True)

    @classmethod
    def install(cls, model: Module, policy: Mapping[str, Any]) -> None:
        cls._install(None, model, policy)

    @classmethod
    def install_from(cls, folder: Path, model: Module, policy: Mapping[str, Any]) -> None:
        cls._install(folder, model, policy)

    @classmethod
    def _install(cls, folder: Path | None, model: Module, policy: Mapping[str, Any]) -> None:
        from ..coupling import attach
        from ..models import towers

        where = f"runtime.json: {cls.id}"
        if not isinstance(policy, Mapping):
            raise ModelError(882, where, "is no object")
        options = dict(policy)
        for option in scorers_of(cls.Config):
            if options.get(option) is not None:
                options[option] = _inside(folder, options[option], f"{where}.{option}")
        try:
            strategy = cls.Config.model_validate(options)
            for option in scorers_of(cls.Config):
                if (path := getattr(strategy, option)) is not None:
                    _check_scorer(path, towers(model).language)  # type: ignore[arg-type]
            attach(model, strategy)  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(884, ".".join([where, *map(str, first["loc"])]), first["msg"].removeprefix("Value error, ")) from error
        except AngelslimError as error:
            raise ModelError(885, f"{where}: {error.where}", error.what) from error


def _inside(folder: Path | None, given: object, where: str) -> Path:
    """A folder of the artifact that a policy names.

    Raises:
        ModelError: there is no artifact, or the folder is none of it.
    """
    if folder is None:
        raise ModelError(886, where, "names files, which lie in an artifact's folder", "load that folder")
    home = (folder / FOLDER).resolve()
    path = home / given if isinstance(given, str) and "\0" not in given else home
    if path.resolve() == home or not path.resolve().is_relative_to(home) or not path.is_dir():
        raise ModelError(887, where, f"{given!r:.100} is no folder under {FOLDER}/ of the artifact")
    return path


def _check_scorer(folder: Path, language: Any) -> None:
    """
    Raises:
        ModelError: the folder holds no scorer, or one of another width.
    """
    from ..scorer import load_scorer

    scorer, width = load_scorer(folder), language.config.hidden_size
    if scorer.in_features != width:
        raise ModelError(881, folder.name, f"scores tokens of {scorer.in_features} numbers, and the model's have {width}", "give the model's own scorer")


def scorers_of(kind: type[PassConfig]) -> tuple[str, ...]:
    """Options of a strategy that name the folder of a scorer."""
    return tuple(name for name, field in kind.model_fields.items() if Path in (field.annotation, *get_args(field.annotation)))


def pass_of(kind: type[Strategy]) -> type[MediaPruning]:
    """The pass of a strategy; a model is pruned by one."""
    others = frozenset(f"mmprune.{other}" for other in CLASSES if other != kind.name)
    values = {"__module__": __name__, "__doc__": kind.__doc__, "id": f"mmprune.{kind.name}", "name": kind.name, "conflicts": others, "Config": kind}
    return type(kind.__name__, (MediaPruning,), values)


PASSES = tuple(pass_of(strategy_class(name)) for name in CLASSES)
