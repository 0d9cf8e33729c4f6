"""Layouts of quantized weights in a checkpoint: names, dtypes, shapes and config, both ways. No algorithm lives here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import PlanError
from ..io.checkpoint import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from ..schemes import CacheScheme, Quantized, Scheme


class Exporter(ABC):
    """One layout.

    Attributes:
        name: what a recipe calls it (`export.format`), and what `Scheme.exporters` lists.
        quant_method: `quantization_config.quant_method` in config.json.
        scale_suffix: suffix of the tensor that holds a weight's scales.
        scale_dtype: dtype the layout prescribes for scales of integer weights, None if it holds any.
        transforms: its config can say what linears multiply their inputs and outputs by.
        groups: one folder can hold several schemes.
        few_levels: it stores the levels of a grid (`Grid.levels`), and codes in as many bits as these need.
    """

    name: ClassVar[str]
    quant_method: ClassVar[str]
    scale_suffix: ClassVar[str] = "weight_scale"
    scale_dtype: ClassVar[str | None] = None
    transforms: ClassVar[bool] = False
    groups: ClassVar[bool] = False
    few_levels: ClassVar[bool] = False

    @abstractmethod
    def layout(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        """Suffix (after the module's name and a dot) -> tensor, without reading a weight.

        Raises:
            PlanError: the layout cannot hold this scheme or shape.
        """

    @abstractmethod
    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        """Suffix -> tensor, just as `layout` announced."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        """Inverse of `pack`."""

    @abstractmethod
    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` for modules -> scheme, with what stays as it is (names, or `re:` and a pattern)."""

    @abstractmethod
    def schemes(self, config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]]) -> dict[str, Scheme]:
        """Inverse of `config`.

        Args:
            config: `quantization_config` of a checkpoint (hostile input).
            modules: module name -> suffixes of its tensors, from the headers.
        Returns:
            module -> scheme for each module that is stored quantized.
        Raises:
            ModelError: config and headers disagree, or the scheme is unknown.
        """

    def weight_shape(self, specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
        """Shape [out, in] of a weight from the headers of its tensors, None where it is that of `weight` or is stored."""
        return None

    def cache(self, config: Mapping[str, Any]) -> CacheScheme | None:
        """How a checkpoint says its KV cache is to be kept, None if as it comes.

        Args:
            config: `quantization_config` (hostile input).

        Raises:
            ModelError: in a way that is not known here.
        """
        return None

    def with_cache(self, config: Mapping[str, Any], scheme: CacheScheme) -> dict[str, Any]:
        """What `config` returned, with a quantized KV cache.

        Raises:
            PlanError: the layout has no place for it.
        """
        raise PlanError(350, self.name, "has no place for a quantized KV cache", "export.format: compressed-tensors has")

    def files(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """Further JSON files that readers of this layout expect beside config.json: name -> content."""
        return {}


def builtin_exporters() -> tuple[type[Exporter], ...]:
    """The layouts the core can write and read."""
    from .awq import AWQ
    from .compressed_tensors import CompressedTensors
    from .gptq import GPTQ
    from .hf_fp8 import HFFP8
    from .modelopt import ModelOpt
    from .packed import Packed

    return (CompressedTensors, HFFP8, GPTQ, AWQ, ModelOpt, Packed)


def group_layouts(bits: int) -> tuple[str, ...]:
    """Names of the layouts that hold weight-only integer grids of channels or groups, preferred first."""
    return ("compressed-tensors", *(("gptq",) if bits in (4, 8) else ()), *(("awq",) if bits == 4 else ()), "packed")
