"""What passes of drafters without weights share: the policy is their options, and `generate` of a loaded model follows it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from angelslim_core.errors import ModelError
from angelslim_core.passes import PassConfig, RuntimePass

if TYPE_CHECKING:
    from torch.nn import Module

    from angelslim_core.context import Context

    from ..drafters.base import Drafter


class Drafting(PassConfig):
    """Options of every drafter."""

    k: int = Field(5, ge=1, le=64, description="tokens to propose a round")


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

        try:
            config: Any = cls.Config.model_validate(policy)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(706, ".".join([f"runtime.json: {cls.id}", *map(str, first["loc"])]), first["msg"]) from error
        Speculative(model, lambda: cls.drafter(config), config.k)
