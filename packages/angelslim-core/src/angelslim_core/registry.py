"""Id -> pass, layout, exporter, kernel, with who brought it; a duplicate is an error that names both."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import PluginError, RecipeError

if TYPE_CHECKING:
    from .adapters.base import Layout
    from .exporters import Exporter
    from .kernels import Kernel
    from .passes import Pass


class Registry:
    """What the loaded plugins brought, the core's own layouts and exporters included."""

    def __init__(self) -> None:
        self.passes: dict[str, type[Pass]] = {}
        self.exporters: dict[str, type[Exporter]] = {}
        self.kernels: dict[str, Kernel] = {}
        self.layouts: list[Layout] = []
        self._owners: dict[tuple[str, str], str] = {}

    def add_passes(self, owner: str, passes: Sequence[type[Pass]]) -> None:
        for pass_ in passes:
            if not pass_.id.startswith(f"{owner}."):
                raise PluginError(1, owner, f"pass {pass_.id!r} must be named {owner}.SOMETHING")
            self._own("pass", pass_.id, owner)
            self.passes[pass_.id] = pass_

    def add_exporters(self, owner: str, exporters: Sequence[type[Exporter]]) -> None:
        for exporter in exporters:
            self._own("exporter", exporter.name, owner)
            self.exporters[exporter.name] = exporter

    def add_kernels(self, owner: str, kernels: Sequence[Kernel]) -> None:
        for kernel in kernels:
            self._own("kernel", kernel.op, owner)
            self.kernels[kernel.op] = kernel

    def add_layouts(self, owner: str, layouts: Sequence[Layout]) -> None:
        for layout in layouts:
            for name in layout.model_types:
                self._own("architecture", name, owner)
            self.layouts.append(layout)

    def _own(self, kind: str, name: str, owner: str) -> None:
        first = self._owners.setdefault((kind, name), owner)
        if first != owner or (kind == "pass" and name in self.passes):
            raise PluginError(2, owner, f"{kind} {name!r} is already registered by {first}")

    def find_pass(self, pass_id: str, where: str = "") -> type[Pass]:
        """The pass of an id.

        Raises:
            RecipeError: no loaded plugin has it; suggests the nearest.
        """
        if pass_id in self.passes:
            return self.passes[pass_id]
        close = difflib.get_close_matches(pass_id, self.passes, 1)
        known = ", ".join(sorted(p for p in self.passes if p.partition(".")[0] == pass_id.partition(".")[0]))
        raise RecipeError(
            60, where or pass_id, f"no pass {pass_id!r}", f"did you mean {close[0]}?" if close else f"passes of this plugin: {known or 'none yet'}"
        )
