"""Runtime passes: one a policy, with the policy's options and those of a model's layers and heads."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from angelslim_core.errors import ModelError, PlanError, UsageError
from angelslim_core.passes import PassConfig, RuntimePass

from ..config import Measure, Override, SparseAttentionConfig
from ..policies import CLASSES
from ..policies.base import Policy

if TYPE_CHECKING:
    from torch.nn import Module

    from angelslim_core.context import Context

# of the whole configuration; the rest of a pass's options are its policy's
_SHARED = frozenset({"min_len", "dense_layers", "block", "executor", "overrides", "chosen_for"})


class Coupled(PassConfig):
    """Options that a pass has beside those of its policy."""

    block: int = Field(128, ge=16, le=1024, multiple_of=16, description="queries and keys a block")
    executor: str = Field(
        "auto", description="what computes attention over kept blocks; auto: the first of triton, flex, flash that takes the call, on a CPU the reference"
    )
    overrides: tuple[Override, ...] = Field(
        (), max_length=4096, description="other policies by layer and head: each layers, heads (none: all), policy, options"
    )
    chosen_for: dict[str, Measure] | None = Field(None, max_length=64, description="shape of the model whose heads were measured; another is refused")

    def attention(self, policy: str) -> SparseAttentionConfig:
        """What `attach` takes."""
        values = self.model_dump(mode="json")
        return SparseAttentionConfig(policy=policy, options={k: v for k, v in values.items() if k not in _SHARED}, **{k: values[k] for k in _SHARED})


class SparsePrefill(RuntimePass):
    """Base of the passes: leaves a `SparseAttentionConfig` that `load` attaches to the model."""

    name: ClassVar[str]

    def policy(self, context: Context) -> Mapping[str, Any]:
        found: SparseAttentionConfig = self.config.attention(self.name)
        text = context.source.config.get("text_config") or context.source.config
        try:
            found.check(text)
        except UsageError as error:
            raise PlanError(550, f"{self.id}: {error.where}", error.what) from error
        return found.model_dump(mode="json")

    @classmethod
    def install(cls, model: Module, policy: Mapping[str, Any]) -> None:
        from ..coupling import attach

        where = f"runtime.json: {cls.id}"
        try:
            config = SparseAttentionConfig.model_validate(policy)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(550, ".".join([where, *map(str, first["loc"])]), first["msg"].removeprefix("Value error, ")) from error
        if config.policy != cls.name:
            raise ModelError(553, where, f"is a policy {config.policy!r:.50}")
        try:
            attach(model, config)  # type: ignore[arg-type]
        except UsageError as error:
            raise ModelError(554, f"{where}: {error.where}", error.what) from error


def _made(name: str) -> type[SparsePrefill]:
    kind: type[Policy] = getattr(import_module(f"..policies.{name}", __name__), CLASSES[name])

    def sound(self: Any) -> Any:
        self.attention(name)
        return self

    namespace = {"__module__": __name__, "__qualname__": f"{kind.__name__}.Config", "sound": model_validator(mode="after")(sound)}
    others = frozenset(f"sparseattn.{other}" for other in CLASSES if other != name)
    return type(
        kind.__name__, (SparsePrefill,),
        {
            "__module__": __name__, "__doc__": kind.__doc__, "id": f"sparseattn.{name}", "name": name, "conflicts": others,
            "Config": type("Config", (Coupled, kind), namespace),
        },
    )  # fmt: skip


PASSES = tuple(_made(name) for name in CLASSES)
