"""Every error a user can cause or must know of: one class per exit code, one number per place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class AngelslimError(Exception):
    """An error with a code, a place, what is wrong and what to do.

    Args:
        number: number of this error within its family, unique in the code base (`AS-RCP-012`).
        where: file, position, option or tensor the error is about.
        what: one line saying what is wrong and, where it helps, what is allowed.
        hint: one line saying what to do.
    """

    family: ClassVar[str] = "BUG"
    exit_code: ClassVar[int] = 1

    def __init__(self, number: int, where: str, what: str, hint: str = "") -> None:
        # hostile input is quoted in messages, so their length is bounded
        where, what, hint = _short(where), _short(what), _short(hint)
        super().__init__(f"{where}: {what}" if where else what)
        self.number = number
        self.where = where
        self.what = what
        self.hint = hint

    @property
    def code(self) -> str:
        """Stable code, for example `AS-MOD-003`."""
        return f"AS-{self.family}-{self.number:03d}"

    def as_dict(self) -> dict[str, str]:
        """The `error` object of a `--json` document."""
        return {"code": self.code, "where": self.where, "what": self.what, "hint": self.hint}


def _short(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


class UsageError(AngelslimError, ValueError):
    """The command line or a function's arguments make no sense together."""

    family, exit_code = "USE", 2


class RecipeError(AngelslimError, ValueError):
    """A recipe, or an option given by `--set`, is wrong."""

    family, exit_code = "RCP", 3


class PlanError(AngelslimError, ValueError):
    """A valid recipe asks for something this model or these passes cannot do together."""

    family, exit_code = "PLN", 3


class PluginError(AngelslimError, ValueError):
    """A plugin is missing, blocked, broken, ambiguous or made for another hook version."""

    family, exit_code = "PLG", 4


class ModelError(AngelslimError, ValueError):
    """A model folder is invalid, unsupported or unsafe."""

    family, exit_code = "MOD", 5


class ResourceError(AngelslimError):
    """Memory or disk does not suffice."""

    family, exit_code = "RES", 6


class OutputError(AngelslimError, ValueError):
    """The output exists, is locked by another run, or would overwrite the source."""

    family, exit_code = "OUT", 7


class NumericError(AngelslimError):
    """Non-finite numbers, or a quality gate that was not met."""

    family, exit_code = "NUM", 8


class EngineError(AngelslimError):
    """An engine the recipe names cannot load the result."""

    family, exit_code = "ENG", 9


class StoppedError(AngelslimError):
    """The run was stopped safely; the same command goes on where it stopped."""

    family, exit_code = "STP", 75


def error_from(document: Mapping[str, str]) -> AngelslimError:
    """The error that `as_dict` described, in another process."""
    classes: list[type[AngelslimError]] = [AngelslimError, *AngelslimError.__subclasses__()]
    families = {c.family: c for c in classes}
    _, family, number = document["code"].split("-")
    return families[family](int(number), document["where"], document["what"], document["hint"])
