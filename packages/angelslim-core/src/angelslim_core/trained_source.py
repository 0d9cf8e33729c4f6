"""A checkpoint as training leaves it: what it will hold, before; its tensors, after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapters.base import Description, Part
from .io.checkpoint import TensorSpec
from .source import Source


class TrainedSource(Source):
    """A source with the weights that training left. Until it has been trained, headers are known, and nothing else can be read.

    Args:
        inner: the source that is trained.
        description: of `inner`.
        biases: names of biases that training adds -> id of the pass that asked for them.
        settings: entries of config.json that change.
        left: the plain folder that training left, or None.
    """

    def __init__(
        self, inner: Source, description: Description, biases: Mapping[str, str], settings: Mapping[str, Any], left: Source | None = None
    ) -> None:  # fmt: skip
        specs = {name: TensorSpec(inner.dtypes[name], inner.shapes[name]) for name in inner.dtypes}
        # what transformers does not hold stays as it is
        untouched = description.mtp_tensors | inner.matrices | {n for n in specs if n.endswith("rotary_emb.inv_freq")}
        outputs = {f"{s.name}.bias": TensorSpec(s.dtype, (s.shape[0],)) for s in description.sites}
        self._aliases: dict[str, str] = {}
        gone: dict[str, str] = {}
        if left is not None:
            trained = {name: TensorSpec(left.dtypes[name], left.shapes[name]) for name in left.dtypes}
            for name in specs.keys() - trained.keys() - untouched:
                if name.endswith("lm_head.weight") and inner.is_tied:
                    self._aliases[name] = f"{description.block.rpartition('.')[0]}.embed_tokens.weight"
                    trained[name] = trained[self._aliases[name]]
                else:
                    gone[name] = "training left it in another form"
            specs = {**{n: trained.get(n, spec) for n, spec in specs.items() if n not in gone}, **trained}
        specs.update({name: outputs[name] for name in biases if name not in specs})
        super().__init__(
            inner.checkpoint, {n: s.dtype for n, s in specs.items()}, {n: s.shape for n, s in specs.items()}, {}, inner.consumed, transforms=inner.transforms
        )
        self.inner, self.left, self.settings = inner, left, dict(settings)
        self._biases, self._dropped = dict(biases), {**inner.dropped, **gone}
        self._trained = frozenset(specs.keys() - untouched)

    @property
    def config(self) -> dict[str, Any]:
        return merged_config(self.inner.config, self.settings)

    @property
    def warnings(self) -> list[str]:
        return self.inner.warnings

    @property
    def changed(self) -> frozenset[str]:
        return self.inner.changed

    @property
    def trained(self) -> frozenset[str]:
        return self._trained

    @property
    def added(self) -> dict[str, str]:
        return self._biases

    @property
    def dropped(self) -> dict[str, str]:
        return self._dropped

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        return self.inner.reports

    def scratch(self, name: str) -> int:
        return self.inner.scratch(name) if name in self.inner.dtypes and name not in self._trained else 0

    def read(self, name: str, part: Part | None = None) -> Any:
        if name not in self._trained:
            return self.inner.read(name, part)
        assert self.left is not None, f"{name} is read before it is trained"
        return self.left.read(self._aliases.get(name, name), part)


def merged_config(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some entries changed, at any depth."""
    nested = {k: merged_config(config[k], v) for k, v in settings.items() if isinstance(v, Mapping) and isinstance(config.get(k), Mapping)}
    return {**config, **settings, **nested}


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that are not as they were, for `merged_config`."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if inside := changed_settings(old, value):
                found[key] = inside
        elif key not in before or old != value:
            found[key] = value
    return found
