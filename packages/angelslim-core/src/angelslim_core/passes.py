"""The four kinds of pass. The kind says what a pass may see, so that the pipeline can bound memory.

A pass is a class with an `id`, a docstring (its first line is the summary) and a nested `Config`; it is returned from
the hook `angelslim_register_passes`. It holds no state but its config and what it settled from headers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, field_serializer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from .adapters.base import Description, Site
    from .context import Context
    from .fake_cache import FakeCache
    from .fake_quant import FakeQuantizer
    from .layer import Layer
    from .loading import Loaded
    from .schemes import CacheScheme, Quantized, Scheme
    from .source import Source


class Kind(str, Enum):
    """What a pass sees: one tensor, one layer, the whole model, or nothing but its own policy."""

    TENSOR = "tensor"
    LAYER = "layer"
    MODEL = "model"
    RUNTIME = "runtime"


class PassConfig(BaseModel):
    """Options of a pass: typed, documented, unknown names refused.

    A field of type `Path` is a file: a relative one counts from the recipe, and records hold its name only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_serializer("*", mode="wrap", when_used="json")
    def _by_name(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        return value.name if isinstance(value, Path) else handler(value)


class Pass(ABC):
    """One step of a recipe.

    Attributes:
        id: "plugin.name".
        kind: set by the base class below.
        claims: what the pass gives its final form per targeted linear ("linear.weight", "linear.input"); two steps
            that claim the same of one linear are refused.
        requires: ids of which each must stand earlier in the recipe.
        conflicts: ids that may not stand in the same recipe.
        default_targets: selectors used when the step names none (see `adapters.base.select`).
    """

    id: ClassVar[str]
    kind: ClassVar[Kind]
    claims: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()
    default_targets: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    class Config(PassConfig):
        pass

    def __init__(self, config: PassConfig | None = None) -> None:
        self.config: Any = self.Config() if config is None else config

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0]

    @classmethod
    def bind(cls, config: PassConfig) -> Pass:
        """The pass with these options; one whose kind depends on them returns a pass of another class, with the same id."""
        return cls(config)

    @property
    def needs_calibration(self) -> bool:
        """Whether the pass reads calibration samples with these options."""
        return False


class WeightPass(Pass):
    """What tensor and layer passes share: they decide from headers alone how each linear will be stored."""

    def settle(self, sites: Sequence[Site], source: Source) -> WeightPass:
        """The pass for these linears, all that its step treats; called before `scheme`, reads no weight.

        Raises:
            PlanError: the options do not fit the model.
        """
        return self

    def open_questions(self) -> list[str]:
        """What only the run can decide, a line each, for `--dry-run`."""
        return []

    @property
    def sources(self) -> Sequence[Source]:
        """Other checkpoints that the settled pass reads; a run whose were changed is not resumed."""
        return ()

    def findings(self, linears: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """Numbers about the step as a whole, for the report.

        Args:
            linears: what the report says of each linear that the step quantized, `Quantized.numbers` among it.

        Under `curves` it may give curves to be drawn: `{title, x, y, points: [[x, y], ...]}`, x and y being labels, and
        with `mark: [x, y]` the point that was chosen.
        """
        return {}

    @property
    def cache(self) -> CacheScheme | None:
        """How keys and values will be kept in the KV cache; None leaves them as they are.

        A pass that says so settles the cache of the whole model. It gives each attention its scales by
        `Layer.store_cache` and leaves weights alone, or is a `TrainedPass`, whose `cache_quantizer` learns them.
        """
        return None

    def scheme(self, site: Site) -> Scheme | None:
        """How `site` will be stored, or None if its weight keeps shape and dtype.

        Raises:
            PlanError: the shape does not fit the options; say which values would fit.
        """
        return None


class TensorPass(WeightPass):
    """Data-free: sees checkpoint tensors, no model is built. Memory is the largest fused set."""

    kind = Kind.TENSOR

    @property
    def joins_fused(self) -> bool:
        """Whether the linears an engine fuses (q, k, v; gate, up) must be seen together, to share a scale."""
        return False

    def prepare(self, context: Context) -> None:
        """Called once before the first tensor, for instance to open a second checkpoint."""

    def fetch(self, sites: Sequence[Site], context: Context) -> Mapping[Site, Tensor]:
        """What the pass needs to read beside the weights of one unit, for instance those of a second checkpoint.

        Called on the thread that reads ahead, while `apply_with` may be at work on an earlier unit.

        Returns:
            at most one tensor for each site, on the CPU, of any shape and dtype; nothing by default.
        """
        return {}

    @property
    def fetches(self) -> bool:
        """Whether it has a `fetch` of its own."""
        return type(self).fetch is not TensorPass.fetch

    def apply_with(self, weights: Mapping[Site, Tensor], fetched: Mapping[Site, Tensor], context: Context) -> Mapping[Site, Quantized | Tensor]:
        """`apply`, with what `fetch` read for these sites, on the device where the weights are.

        A pass that fetches implements this one; its `apply` is `self.apply_with(weights, self.fetch([*weights], context), context)`.
        """
        return self.apply(weights, context)

    @abstractmethod
    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> Mapping[Site, Quantized | Tensor]:
        """Compress one unit.

        Args:
            weights: one linear, or one fused set if `joins_fused`; each [out, in] in the source's dtype.
        Returns:
            for each site what `scheme` announced: a `Quantized`, or a tensor of the same shape and dtype.
        """


class SourcePass(Pass):
    """Data-free: changes the model's tensors as they are read, before any weight pass; its function stays the same.

    It treats the model as a whole, so its step takes neither `targets` nor `ignore`.
    """

    kind = Kind.TENSOR

    @abstractmethod
    def rewrite(self, source: Source, description: Description, device: str, seed: int) -> Source:
        """The source of all later steps, a `RewrittenSource`; decided from headers, no weight is read.

        Raises:
            PlanError: the model's function would change.
        """


class LayerPass(WeightPass):
    """Sees one decoder layer with the inputs captured for it. Memory is one layer and the activations.

    Attributes:
        needs_reference: the pass reads `LayerBatch.reference` and `target`, which the unchanged model yields; the
            sweep then carries a second stream of activations.
    """

    kind = Kind.LAYER
    needs_reference: ClassVar[bool] = False

    @property
    def needs_calibration(self) -> bool:
        return True

    def measure(self, sites: Sequence[Site], context: Context) -> LayerPass:
        """The pass with what it must learn of the model before schemes are final; called once, before the sweep.

        Whatever takes long is kept under `context.workdir / "measured"`, where a resumed run finds it.
        """
        return self

    @abstractmethod
    def run(self, layer: Layer) -> Mapping[str, Any]:
        """Compress the layer: observe inputs, then `layer.store` results. Returns numbers for the report."""


class TrainedPass(TensorPass):
    """Says how linears round while a later step of the recipe trains the model, and stores what training left.

    It trains nothing itself: a `ModelPass` after it does, with the quantizers in place (see `fake_quant`). Targets,
    `claims` and `scheme` are those of any weight pass; the pipeline puts the quantizers in, and keeps their `Quantized`.
    With a `cache` the keys and values of all attentions round, too (see `fake_cache`), whatever linears it targets.

    Attributes:
        adds_bias: quantizers leave a bias (`FakeQuantizer.bias`), for which the architecture must have a place.
    """

    kind = Kind.MODEL
    claims = frozenset({"linear.weight"})
    adds_bias: ClassVar[bool] = False

    @property
    def trains_weight(self) -> bool:
        """What its quantizers say (`FakeQuantizer.trains_weight`), known before any is made."""
        return True

    def quantizers(self, weights: Mapping[Site, Tensor]) -> Mapping[Site, FakeQuantizer]:
        """How the linears of one unit round, one linear, or one fused set if `joins_fused`; `quantizer` of each by default."""
        return {site: self.quantizer(site, weight) for site, weight in weights.items()}

    @abstractmethod
    def quantizer(self, site: Site, weight_OI: Tensor) -> FakeQuantizer:
        """How a linear rounds, its scales set from the weight [O, I] that training begins with."""

    def cache_quantizer(self, heads: int) -> FakeCache:
        """How the keys and values of an attention with that many key-value heads round; asked of a pass with a `cache` only."""
        raise NotImplementedError

    def apply(self, weights: Mapping[Site, Tensor], context: Context) -> Mapping[Site, Quantized | Tensor]:
        from .fake_quant import read_trained

        schemes = {site: self.scheme(site) for site in weights}
        return {s: read_trained(context.workdir, s.name, scheme).to(weights[s].device) for s, scheme in schemes.items() if scheme is not None}


class ModelPass(Pass):
    """Sees the whole model with gradients. What it leaves in the model is the source of the steps after it."""

    kind = Kind.MODEL

    def trained_weights(self, rounded: Sequence[tuple[TrainedPass, Sequence[Site]]], weights: Mapping[str, int]) -> int:
        """How many weights of the model are trained at a time, by which memory and disk are estimated.

        Args:
            rounded: the earlier steps that say how linears round, each with its linears.
            weights: how many numbers each tensor of the model has, by its name.
        """
        return sum(weights.values())

    @abstractmethod
    def run(self, model: Module, context: Context) -> Mapping[str, Any]:
        """Train or rewrite `model` in place; linears of earlier `TrainedPass` steps round (see `fake_quant.placed`).

        Called in every process of `context.group`, each with the whole model on its device; what it leaves in the first
        one's is kept. What takes long is kept under `context.workdir / "measured"`, where a resumed run finds it.

        Returns:
            numbers for the report, with `curves` as in `WeightPass.findings`.
        """


class RuntimePass(Pass):
    """Changes no weight: leaves a declarative policy that `load` installs."""

    kind = Kind.RUNTIME

    @abstractmethod
    def policy(self, context: Context) -> Mapping[str, Any]:
        """The policy, JSON only."""

    def leave(self, folder: Path) -> None:
        """Put files that the policy names, and that exist already, into the output; nothing by default. In the first process only, before any `make`."""

    def make(self, loaded: Loaded, folder: Path, context: Context) -> Mapping[str, Any]:
        """Make files that the policy names; nothing by default. Called in the first process only, once the weights are written.

        Args:
            loaded: the output as it will be served, but for runtime policies: quantized linears and KV cache round as engines do.
            folder: the output, not yet published. What takes long is kept under `context.workdir / "measured"` until it is
                done, where a resumed run finds it.

        Returns:
            numbers for the report.
        """
        return {}

    @property
    def makes(self) -> bool:
        """Whether it has a `make` of its own."""
        return type(self).make is not RuntimePass.make

    @classmethod
    @abstractmethod
    def install(cls, model: Module, policy: Mapping[str, Any]) -> None:
        """Make a loaded model follow a policy read from an artifact (hostile input: validate it)."""

    @classmethod
    def install_from(cls, folder: Path, model: Module, policy: Mapping[str, Any]) -> None:
        """`install`, where the policy names files of the artifact in `folder` (both are hostile input)."""
        cls.install(model, policy)
