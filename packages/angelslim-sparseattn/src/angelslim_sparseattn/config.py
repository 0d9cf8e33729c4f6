"""How a model's layers and heads attend, as plain data: what passes write into artifacts and `attach` reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from angelslim_core.errors import UsageError
from angelslim_core.passes import PassConfig

from .kernels.block_sparse import BLOCK_SPARSE
from .policies import make_policy
from .policies.base import MOST_TOKENS, Policy
from .policies.strided import Strided

# bounds keep what a hostile artifact makes us do small
LayerNumber = Annotated[int, Field(ge=0, lt=1024)]
HeadNumber = Annotated[int, Field(ge=0, lt=4096)]
MOST_LAYERS = 1024
# layers, or heads of layers, that overrides name
MOST_OVERRIDDEN = 2**15
Measure = Annotated[int | float, Field(ge=0, le=2**53, allow_inf_nan=False)]
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
# heads, None: all, and what they follow
_Part = tuple[tuple[int, ...] | None, Policy | None]


class Override(PassConfig):
    """Another policy for some layers, or for some heads of them."""

    layers: tuple[LayerNumber, ...] = Field(min_length=1, max_length=MOST_LAYERS, description="numbers of layers")
    heads: tuple[HeadNumber, ...] | None = Field(None, min_length=1, max_length=4096, description="numbers of query heads; none: all")
    policy: str = Field(description="name of a policy, or dense")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the policy")


def shape_of(text: Mapping[str, Any]) -> dict[str, int | float]:
    """What tells a text config's model from others whose heads may look elsewhere."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = text.get("rope_theta", rope.get("rope_theta"))
    found = {name: text[name] for name in SHAPE if isinstance(text.get(name), int)}
    return found if theta is None else {**found, "rope_theta": float(theta)}


class SparseAttentionConfig(PassConfig):
    """A policy for a model, and exceptions by layer and head.

    An override of whole layers replaces the policy there; one of heads replaces that for these heads. Dense layers have no
    overrides, and no layer, and no head of a layer, has two.

    Raises:
        ValueError: as a pydantic `ValidationError`: an unknown policy, option or executor, or overrides that contradict.
    """

    policy: str = Field("stem", description="name of a policy, or dense")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the policy")
    block: int = Field(128, ge=16, le=1024, multiple_of=16, description="queries and keys a block")
    min_len: int = Field(8192, ge=0, le=MOST_TOKENS, description="sequences with fewer keys attend to everything")
    dense_layers: tuple[LayerNumber, ...] = Field((0, 1), max_length=MOST_LAYERS, description="layers that attend to everything")
    executor: str = Field(
        "auto", description="what computes attention over kept blocks; auto: the first of triton, flex, flash that takes the call, on a CPU the reference"
    )
    overrides: tuple[Override, ...] = Field((), max_length=4096, description="other policies by layer and head")
    chosen_for: dict[str, Measure] | None = Field(None, max_length=64, description="shape of the model whose heads were measured; another is refused")

    @field_validator("executor")
    @classmethod
    def _known(cls, executor: str) -> str:
        names = ("auto", "reference", *(i.name for i in BLOCK_SPARSE.implementations))
        if executor not in names:
            raise ValueError(f"no executor {executor!r:.50}; choose one of: {', '.join(names)}")
        return executor

    @model_validator(mode="after")
    def _sound(self) -> SparseAttentionConfig:
        if sum(len(override.layers) * len(override.heads or (None,)) for override in self.overrides) > MOST_OVERRIDDEN:
            raise ValueError(f"overrides name heads, or whole layers, more than {MOST_OVERRIDDEN} times")
        rest, dense = self._made(self.policy, self.options), frozenset(self.dense_layers)
        taken: set[tuple[int, int | None]] = set()
        of_layer: defaultdict[int, list[_Part]] = defaultdict(list)
        for override in self.overrides:
            policy = self._made(override.policy, override.options)
            for layer in override.layers:
                if layer in dense:
                    raise ValueError(f"layer {layer} is among dense_layers and has an override")
                for head in override.heads or (None,):
                    if (layer, head) in taken:
                        raise ValueError(f"two overrides of layer {layer}" + ("" if head is None else f", head {head}"))
                    taken.add((layer, head))
                of_layer[layer].append((override.heads, policy))
        for layer in sorted(of_layer):
            self._joined(rest, of_layer[layer])
        return self

    def _made(self, name: str, options: dict[str, Any]) -> Policy | None:
        if name == "dense":
            if options:
                raise ValueError("dense has no options")
            return None
        if misplaced := {"min_len", "dense_layers"} & options.keys():
            raise ValueError(f"{', '.join(sorted(misplaced))}: of the whole configuration, not of a policy")
        try:
            policy = make_policy(name, **options, min_len=self.min_len, dense_layers=())
        except (UsageError, TypeError) as error:
            raise ValueError(str(error)) from error
        if isinstance(policy, Strided) and self.block % policy.stride:
            raise ValueError(f"{name}.stride: {policy.stride} does not divide the block of {self.block}")
        return policy

    def check(self, text: Mapping[str, Any]) -> None:
        """Whether a model has what overrides name, and is the one that they were chosen for.

        Args:
            text: its text config.

        Raises:
            UsageError: it has not, or is not.
        """
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        for override in self.overrides:
            for what, numbers, most in (("layer", override.layers, layers), ("head", override.heads or (), heads)):
                if max(numbers, default=0) >= most:
                    raise UsageError(552, "overrides", f"{what} {max(numbers)} of a model with {most}")
        own = shape_of(text)
        for name, wanted in (self.chosen_for or {}).items():
            if name in own and own[name] != wanted:
                raise UsageError(555, "chosen_for", f"{name} is {wanted:g}, the model's is {own[name]:g}", "choose anew for this model")

    def policy_of(self, layer: int) -> Policy | None:
        """What the layer's heads follow; None: it attends to everything."""
        if layer in self.dense_layers:
            return None
        own = [(o.heads, self._made(o.policy, o.options)) for o in self.overrides if layer in o.layers]
        return self._joined(self._made(self.policy, self.options), own)

    def _joined(self, rest: Policy | None, own: Sequence[_Part]) -> Policy | None:
        """A layer's policy: `rest`, its overrides in its place."""
        for heads, policy in own:
            if heads is None:
                rest = policy
        parts = tuple((heads, policy) for heads, policy in own if heads is not None)
        if not parts:
            return rest
        from .policies.hybrid import Hybrid

        return Hybrid(rest=rest, parts=parts, min_len=self.min_len, dense_layers=())
