"""What mixed precision chooses from, for what it chooses, and what each choice costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from angelslim_core.exporters.compressed_tensors import CompressedTensors
from angelslim_core.io.checkpoint import DTYPES
from angelslim_core.io.writer import spec_bytes
from angelslim_core.passes import PassConfig, WeightPass

from .passes.fp8_dynamic import FP8Dynamic
from .passes.gptaq import GPTAQ
from .passes.gptq import GPTQ
from .passes.int8_dynamic import INT8Dynamic

if TYPE_CHECKING:
    from angelslim_core.adapters.base import Site
    from angelslim_core.schemes import Scheme

# roles that engines run as one kernel beyond the fused sets, so that they take one scheme within a layer
TOGETHER = (("expert_gate", "expert_up", "expert_down"),)


class CandidateConfig(PassConfig):
    """Options that the candidates share."""

    group_size: int = Field(128, ge=8, description="Inputs that share a scale in the candidates with integer weights only.")
    symmetric: bool = Field(True, description="Those candidates have no zero point.")
    compensation: Literal["gptq", "gptaq"] = Field("gptaq", description="How their rounding errors are made up for.")


def _compensated(bits: int) -> Callable[[CandidateConfig], WeightPass]:
    def make(config: CandidateConfig) -> WeightPass:
        options: dict[str, Any] = {"bits": bits, "group_size": config.group_size, "symmetric": config.symmetric}
        return GPTQ(GPTQ.Config(**options)) if config.compensation == "gptq" else GPTAQ(GPTAQ.Config(**options))

    return make


Candidate = Literal["int2", "int3", "int4", "int5", "int6", "int8a16", "int8", "fp8", "keep"]
# name -> the pass that quantizes to it, or None to keep the linear as it is
CANDIDATES: Mapping[Candidate, Callable[[CandidateConfig], WeightPass | None]] = {
    "int2": _compensated(2),
    "int3": _compensated(3),
    "int4": _compensated(4),
    "int5": _compensated(5),
    "int6": _compensated(6),
    "int8a16": _compensated(8),
    "int8": lambda _: INT8Dynamic(),
    "fp8": lambda _: FP8Dynamic(),
    "keep": lambda _: None,
}


@dataclass(frozen=True)
class Unit:
    """Linears that take one scheme."""

    name: str
    sites: tuple[Site, ...]

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(math.prod(site.shape) for site in self.sites)

    def bits(self, pass_: WeightPass | None) -> int:
        """Bits of its weights with scales and zero points."""
        return sum(stored_bits(site, pass_.scheme(site) if pass_ else None) for site in self.sites)


def units_of(sites: Iterable[Site]) -> list[Unit]:
    """The linears of a step by what must be uniform: the experts of a layer, a fused set, or a linear alone."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        alike = site.expert is not None and any(site.role in roles for roles in TOGETHER)
        name = site.name.rpartition(f".{site.expert}.")[0] if alike else site.fused or site.name
        found.setdefault(name, []).append(site)
    return [Unit(name, tuple(members)) for name, members in found.items()]


def stored_bits(site: Site, scheme: Scheme | None) -> int:
    """Bits of a weight with scales and zero points; None is the weight as it is."""
    if scheme is None:
        return math.prod(site.shape) * DTYPES[site.dtype][0]
    # the only layout that holds several schemes; a shape is no part of the weight
    tensors = CompressedTensors().layout(site.shape, scheme)
    return 8 * sum(spec_bytes(spec) for name, spec in tensors.items() if name != "weight_shape")
