"""Checks of what a folder stores quantized: two readers, scales that must be equal, what stayed as it was, the KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .adapters import loaded_names
from .context import Progress
from .errors import ModelError
from .second_reader import MARKS, SecondReader, shared_scales
from .source import quantization_config

if TYPE_CHECKING:
    from torch import Tensor

    from .adapters.base import Description, Site
    from .source import Source

# two readings may order their multiplications differently; this many times a value is far above that in fp32
TOLERANCE = 1e-6


class StoredChecks:
    """Everything about the quantized linears of a folder.

    Attributes:
        problems: one line each.
        rows: with a base, per linear `name`, `sqnr_db`, `cosine`.
        differ: linears of which the two readers make different weights.
    """

    def __init__(self, source: Source, description: Description) -> None:
        self.source, self.description = source, description
        self.second = SecondReader(quantization_config(source.config) or {})
        self.problems: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.differ: list[str] = []
        stored: dict[str, list[str]] = {}
        for name in source.checkpoint.tensors:
            module, _, suffix = name.rpartition(".")
            stored.setdefault(module, []).append(suffix)
        self._suffixes = stored

    def read(self, base: Mapping[str, Site] | None, base_source: Source | None, skip: frozenset[str], progress: Progress) -> None:
        """Read every quantized linear twice, and compare it with the base.

        Args:
            base: the base's linears by name.
            skip: linears whose weight stands in another basis than the base's.
        """
        modules = list(self.source.quantized)
        if self.second.knows:
            for module, suffixes in self._suffixes.items():
                if MARKS & set(suffixes) and module not in self.source.quantized:
                    self.problems.append(f"{module}: has {sorted(MARKS & set(suffixes))[0]}, and is not read as quantized")
        for done, module in enumerate(modules, 1):
            try:
                weight = self._twice(module)
            except ModelError as error:
                self.problems.append(str(error) if error.where.startswith(module) else f"{module}: {error}")
                continue
            if base is not None and base_source is not None and module in base and module not in skip:
                self._against(module, weight, base_source.read(base[module].tensor, base[module].part))
            progress(done, len(modules), module)

    def _twice(self, module: str) -> Tensor:
        """The weight as the second reader has it, where it knows the layout."""
        import torch

        own = self.source.read_quantized(module).dequantize()
        if not self.second.knows:
            return own
        missing = self.second.missing(module, self._suffixes[module])
        self.problems.extend(f"{module}: has no {suffix}, which its config asks for" for suffix in missing)
        parts = {suffix: self.source.checkpoint.read(f"{module}.{suffix}") for suffix in self._suffixes[module]}
        weight = self.second.weight(module, parts)
        if weight.shape != own.shape or not torch.allclose(own, weight, rtol=TOLERANCE, atol=0, equal_nan=True):
            self.differ.append(module)
            self.problems.append(f"{module}: two readers of {self.second.method} make different weights of it")
        return weight

    def _against(self, module: str, weight: Tensor, reference: Tensor) -> None:
        if weight.shape != reference.shape:
            self.problems.append(f"{module}: has shape {list(weight.shape)}, the base {list(reference.shape)}")
            return
        restored, original = weight.flatten(), reference.float().flatten()
        norm, signal = float(restored.norm() * original.norm()), float(original.square().sum())
        cosine = float(restored @ original) / norm if norm else 1.0
        noise = float(restored.sub_(original).square_().sum())
        sqnr = round(10 * math.log10(signal / noise), 3) if noise > 0 and 0 < signal < math.inf else None
        self.rows.append({"name": module, "sqnr_db": sqnr, "cosine": cosine})

    def shared(self) -> None:
        """Linears that engines run as one matmul agree on the scales that are one number."""
        first: dict[str, tuple[str, dict[str, float]]] = {}
        for site in self.description.sites:
            if site.fused is None or site.name not in self.source.quantized:
                continue
            scales = shared_scales({s: self.source.checkpoint.read(f"{site.name}.{s}") for s in self._suffixes[site.name] if "scale" in s})
            other, theirs = first.setdefault(site.fused, (site.name, scales))
            unequal = sorted(s for s in scales.keys() | theirs.keys() if scales.get(s) != theirs.get(s))
            if unequal:
                self.problems.append(f"{site.name}: its {' and '.join(unequal)} differ from those of {other}, and engines run both as one matmul")

    def left_alone(self) -> list[dict[str, Any]]:
        """Linears that stayed as they were, `{name, role, ignored}`; both they and the others are held against the ignore list."""
        quantized = self.source.quantized
        for module in quantized:
            if self._ignored(module):
                self.problems.append(f"{module}: is stored quantized, and the config says that it is ignored")
        roles = {s.role for s in self.description.sites if s.name in quantized}
        found = []
        for name, role, inside in self._plain_linears():
            ignored = self._ignored(name)
            found.append({"name": name, "role": role, "ignored": ignored})
            wanted = role in roles or (self.second.method == "compressed-tensors" and inside and any(map(self.second.targets, self._names(name))))
            if wanted and not ignored:
                self.problems.append(f"{name}: stayed unquantized, and the config does not say that it is ignored")
        return found

    def _plain_linears(self) -> Iterator[tuple[str, str, bool]]:
        """(module, role, whether engines build it as a linear of the language model) for linears stored as they were."""
        sites = self.description.sites
        for site in sites:
            if site.name not in self.source.quantized and not site.part:
                yield site.name, site.role, site.layer is not None or site.role == "head"
        if not any(s.role == "head" for s in sites):
            yield "lm_head", "head", True
        for name in sorted(self.description.mtp_tensors):
            if (
                name.endswith(".weight")
                and len(self.source.shapes[name]) == 2
                and "embed" not in name
                and name.removesuffix(".weight") not in self.source.quantized
            ):
                yield name.removesuffix(".weight"), "mtp", True

    def _names(self, module: str) -> set[str]:
        """A module's names: in the checkpoint, and where transformers loads it."""
        return {module, *loaded_names(self.description.layout, [module]).values()}

    def _ignored(self, module: str) -> bool:
        return any(map(self.second.ignores, self._names(module)))

    def kv_cache(self) -> None:
        """Each attention has the scales of keys and values that the config asks for, and none that it does not."""
        strategy = self.second.kv_strategy()
        stored = {n for n in self.source.checkpoint.tensors if n.endswith((".k_scale", ".v_scale"))}
        if strategy is None:
            self.problems.extend(f"{name}: is stored, but the config has no kv_cache_scheme" for name in sorted(stored))
            return
        text = self.source.config.get("text_config") or self.source.config
        wanted = text.get("num_key_value_heads") if strategy == "attn_head" else 1
        for site in self.description.sites:
            if site.role not in ("k", "v") or site.layer is None:
                continue
            places = [f"{site.name}.{site.role}_scale", f"{site.name.rpartition('.')[0]}.{site.role}_scale"]
            name = next((place for place in places if place in stored), None)
            if name is None:
                self.problems.append(f"{places[1]}: is missing, and the config has a kv_cache_scheme")
            elif (count := math.prod(self.source.checkpoint.tensors[name].shape)) != wanted:
                self.problems.append(f"{name}: holds {count} scales, {strategy} needs {wanted}")
