"""Packed linears in a model: which linears become packed, places for them while it is built, and their weights."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .adapters.base import Description
from .errors import ModelError
from .model import decoder_layers
from .schemes import Quantized
from .source import Source, compute_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from .adapters.base import Site
    from .packed import PackedLinear
    from .plugins import PluginHost


class Linears:
    """The linears of a model by their names in the checkpoint; routed experts are separated when one is asked for.

    Args:
        keep: separated experts use the weights that there are.
    """

    def __init__(self, model: PreTrainedModel, description: Description, keep: bool = True) -> None:
        self.model, self.description, self._keep = model, description, keep
        _, self.layers = decoder_layers(model, description.num_layers)
        self.sites = {s.name: s for s in description.sites}
        self._separated: set[int] = set()

    def __call__(self, name: str) -> nn.Module:
        parent, inner = self._place(name)
        try:
            return parent.get_submodule(inner)
        except AttributeError as error:
            raise ModelError(261, name, "is quantized, but the model transformers builds has no such linear") from error

    def put(self, name: str, module: nn.Module) -> None:
        """Replace a linear."""
        setattr(self.parent(name), name.rpartition(".")[2], module)

    def parent(self, name: str) -> nn.Module:
        """The module that a linear is a child of."""
        above, inner = self._place(name)
        return above.get_submodule(inner.rpartition(".")[0])

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module below which a linear is found, and its name there."""
        from .unfuse import unfuse

        site = self.sites.get(name)
        parent: Any = self.model
        inner = name
        if site is not None and site.layer is not None:
            parent, inner = self.layers[site.layer], name.removeprefix(f"{self.description.block}.{site.layer}.")
            if site.expert is not None and site.layer not in self._separated:
                unfuse(parent, keep=self._keep)
                self._separated.add(site.layer)
        return parent, inner


def choose_packed(source: Source, description: Description, host: PluginHost, device: str, packed: bool | str) -> dict[str, type[PackedLinear]]:
    """Module -> class that runs it as stored; of a layer's routed experts all or none."""
    from .io.checkpoint import torch_dtype

    if not source.quantized or not packed:
        return {}
    known = host.linears()
    dtype = torch_dtype(compute_dtype(source, description))

    def choose(site: Site) -> type[PackedLinear] | None:
        scheme = source.quantized.get(site.name)
        outside = site.layer is None and (site.name != "lm_head" or source.is_tied)  # towers go by other names in transformers
        if scheme is None or outside or f"{site.name}.weight" in description.mtp_tensors:
            return None
        fitting = (c for c in known if c.supports(scheme, site.shape, dtype, device)[0])
        return next((c for c in fitting if packed is True or c.pays(scheme, dtype, device)), None)

    chosen = {site.name: (site, choose(site)) for site in description.sites}
    whole = {site.layer for site, _ in chosen.values() if site.expert is not None}
    whole -= {site.layer for site, found in chosen.values() if site.expert is not None and found is None}
    return {name: found for name, (site, found) in chosen.items() if found is not None and (site.expert is None or site.layer in whole)}


def with_holes(model_class: Any, description: Description, classes: Mapping[str, type[PackedLinear]]) -> Any:
    """A model class that builds nothing where packed linears will be, so that no weight is ever made there."""
    from torch import nn

    from .packed import Hole

    class WithHoles(model_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            linears = Linears(self, description, keep=False)
            for name in classes:
                linear = linears(name)
                if not isinstance(linear, nn.Linear):
                    raise ModelError(423, name, f"is quantized, but transformers builds a {type(linear).__name__} there")
                linears.put(name, Hole(linear.bias))

    # transformers renames tensors by the name of the class, and those of its own modules only
    WithHoles.__name__, WithHoles.__module__ = model_class.__name__, model_class.__module__
    return WithHoles


def fill(
    linears: Linears, read: Callable[[str], Quantized], classes: Mapping[str, type[PackedLinear]], dtype: torch.dtype, device: str
) -> str:  # fmt: skip
    """Put packed linears into a model as they are read, those that engines run as one joined, gated MLPs and norms fused; says which.

    Args:
        read: the weight of a linear, on any device.
        classes: as `choose_packed` returns them.
    """
    from .gated import Names, gate
    from .normed import join_norm
    from .packed import SharedInput, join

    counts: Counter[str] = Counter()
    layers: dict[int, SharedInput] = {}
    for names in _together(linears.description, classes):
        made = [classes[n](read(n).to(device), linears(n).bias, dtype) for n in names]  # type: ignore[arg-type]
        joined = join(made)
        layer = linears.sites[names[0]].layer
        for name, linear in zip(names, made, strict=True):
            linears.put(name, linear)
            counts[linear.name] += 1
        for linear in made if joined is None else [*made, joined]:
            if layer is not None and (linear.prepares is not None or joined is not None):
                if layer not in layers:
                    layers[layer] = SharedInput(linears.layers[layer])
                linear.shared = layers[layer]
    mlps: dict[str, dict[str, str]] = {}
    for name in classes:
        path, _, child = name.rpartition(".")
        mlps.setdefault(path, {})[linears.sites[name].role.rpartition("_")[2]] = child
    for path, children in mlps.items():
        if children.keys() >= {*Names._fields}:
            gate(linears.parent(f"{path}.{children['down']}"), Names(*(children[role] for role in Names._fields)), dtype)
    for norm, readers in _normed(linears, classes):
        join_norm(norm, readers, dtype)
    linears.model.requires_grad_(False)
    return " and ".join(f"{n} linears packed ({name})" for name, n in sorted(counts.items())) + " by AngelSlim"


def _together(description: Description, classes: Mapping[str, type[PackedLinear]]) -> list[list[str]]:
    """Names of linears to be read at a time: those of one class that read one input, in the order of their roles, or one."""
    sets: dict[tuple[Any, ...], list[Site]] = {}
    for site in description.sites:
        if site.name in classes:
            sets.setdefault((site.fused or site.name, classes[site.name]), []).append(site)
    order = {role: i for roles in description.layout.fused for i, role in enumerate(roles)}
    return [[s.name for s in sorted(sites, key=lambda s: order.get(s.role, 0))] for sites in sets.values()]


def _normed(linears: Linears, classes: Mapping[str, type[PackedLinear]]) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """What feeds packed linears alone, and these; routed experts get some of its rows only."""
    inside: dict[int, dict[str, Site]] = {}
    for site in linears.sites.values():
        if site.layer is not None:
            name = site.name.removeprefix(f"{linears.description.block}.{site.layer}.")
            inside.setdefault(site.layer, {})[name if site.expert is None else name.replace(f".{site.expert}.", ".{e}.", 1)] = site
    for layer, feed in itertools.product(inside, linears.description.layout.feeds):
        readers = [inside[layer][r] for r in feed.readers if r in inside[layer]]
        if readers and all(s.name in classes and s.expert is None for s in readers):
            yield linears.layers[layer].get_submodule(feed.source), [linears(s.name) for s in readers]
