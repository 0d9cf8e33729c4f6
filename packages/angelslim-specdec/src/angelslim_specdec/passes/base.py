"""What passes share, and those of drafters without weights: the policy is their options, and `generate` of a loaded model follows it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from angelslim_core.errors import ModelError
from angelslim_core.passes import PassConfig, RuntimePass

if TYPE_CHECKING:
    from torch.nn import Module

    from angelslim_core.context import Context

    from ..drafters.base import Drafter

_Kind = TypeVar("_Kind", bound=BaseModel)
NAMES = ("ngram", "suffix", "eagle3", "dflash", "dflare", "dfly", "dspark", "mtp")


def others(name: str) -> frozenset[str]:
    """Ids of the passes that exclude the one of this name: a model decodes with one drafter."""
    return frozenset(f"specdec.{other}" for other in NAMES if other != name)


class Drafting(PassConfig):
    """Options of every drafter."""

    k: int = Field(5, ge=1, le=64, description="tokens to propose a round")


def checked(kind: type[_Kind], policy: object, pass_id: str) -> _Kind:
    """A policy that was read from an artifact.

    Raises:
        ModelError: it is none of this kind.
    """
    try:
        return kind.model_validate(policy)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(706, ".".join([f"runtime.json: {pass_id}", *map(str, first["loc"])]), first["msg"]) from error


class TrainingFree(RuntimePass):
    """Base of the passes, each of whose `Config` is a `Drafting`."""

    def policy(self, context: Context) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.config.model_dump(mode="json")
        return found

    @classmethod
    @abstractmethod
    def drafter(cls, config: Any) -> Drafter:
        """A drafter with these options."""

    @classmethod
    def install(cls, model: Module, policy: Mapping[str, Any]) -> None:
        from ..runtime import Speculative

        config: Any = checked(cls.Config, policy, cls.id)
        Speculative(model, lambda target: cls.drafter(config), config.k)
