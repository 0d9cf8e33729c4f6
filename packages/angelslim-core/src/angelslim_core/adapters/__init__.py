"""Architectures as tables; one file per family. A new architecture is a `Layout` in a file here, or in a plugin."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import ModelError, PlanError, PluginError
from .base import Layout

# what published configs leave to the default of their class, by the type of the language model
_UNSAID: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {name: {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32} for name in ("llama", "qwen2")}
)


def spelled_out(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the sizes that its `text_config` does not name; where it names all, the config itself."""
    text = config.get("text_config")
    unsaid = _UNSAID.get(str(text.get("model_type")), {}) if isinstance(text, dict) else {}
    if all(key in text for key in unsaid):  # type: ignore[operator]
        return config
    return {**config, "text_config": {**unsaid, **text}}  # type: ignore[dict-item]


def builtin_layouts() -> tuple[Layout, ...]:
    """The architectures the core knows."""
    from . import deepseek_v3, gemma3, glm4_moe, hunyuan_moe, llama, qwen3_moe, qwen3_next

    files = (llama, gemma3, qwen3_moe, qwen3_next, deepseek_v3, glm4_moe, hunyuan_moe)
    return tuple(layout for file in files for layout in file.LAYOUTS)


def model_type(config: Mapping[str, Any]) -> str:
    """`model_type` of a config."""
    found = config.get("model_type")
    if not isinstance(found, str) or not found:
        raise ModelError(28, "config.json", "has no model_type")
    return found


def find_layout(config: Mapping[str, Any], layouts: Iterable[Layout], hint: str = "") -> Layout:
    """The table of a model's architecture.

    Args:
        hint: what to do where there is none, instead of adding one.

    Raises:
        ModelError: no table serves it; names the file to add.
        PluginError: two tables claim it.
    """
    name = model_type(config)
    layouts = list(layouts)
    found = [layout for layout in layouts if name in layout.model_types]
    if len(found) > 1:
        raise PluginError(50, name, "two adapters claim this architecture", "unload one of the plugins")
    if not found:
        known = sorted({t for layout in layouts for t in layout.model_types})
        close = difflib.get_close_matches(name, known, 1)
        like = f"; like {close[0]}?" if close else ""
        hint = hint or f"add a Layout in angelslim_core/adapters/{name[:60]}.py or in a plugin{like}"
        raise ModelError(29, "config.json", f"unknown architecture {name[:100]!r}", hint)
    return found[0]


def transformers_type(layout: Layout, config: Mapping[str, Any]) -> str:
    """Name under which transformers knows a model; a config that nests its language model's is loaded as it is."""
    name = model_type(config)
    return name if "text_config" in config else layout.loads_as.get(name, name)


def gguf_architecture(layout: Layout, config: Mapping[str, Any]) -> str:
    """Name that llama.cpp has for a model's architecture.

    Raises:
        PlanError: the table gives none.
    """
    name = model_type(config)
    if name not in layout.gguf:
        raise PlanError(226, "gguf", f"no name in llama.cpp is known for {name[:50]!r}", "Llama, Mistral, Qwen2 and Qwen3 can be written")
    return layout.gguf[name]


def bias_keys(layout: Layout, config: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
    """Key of config.json -> roles whose linears it gives a bias; none for a config that nests its language model's."""
    return {} if "text_config" in config else layout.biases.get(model_type(config), {})


def loaded_names(layout: Layout, names: Iterable[str]) -> dict[str, str]:
    """Module of a checkpoint -> its name in transformers' model, for those where the two differ."""
    return {name: new + name.removeprefix(old) for name in names for old, new in layout.renamed.items() if name.startswith(old)}


def transformers_identity(layout: Layout, config: Mapping[str, Any]) -> dict[str, str]:
    """The entry of config.json by which transformers chooses its classes."""
    return {"model_type": transformers_type(layout, config)}


def named(name: str) -> dict[str, str]:
    """The entry of config.json that gives an architecture's name, for a config made from nothing."""
    return {"model_type": name}


def architecture(config: Mapping[str, Any]) -> dict[str, str]:
    """Class and type that a config names, for people."""
    classes = config.get("architectures")
    return {"architecture": str(classes[0]) if isinstance(classes, list) and classes else "unknown", "model_type": model_type(config)}
