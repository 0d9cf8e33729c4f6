"""What a model folder is, from its headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .adapters import architecture
from .io.hub import resolve
from .plugins import PluginHost
from .source import describe_source, open_any, quantization_config


def inspect_model(model: str | Path, *, host: PluginHost | None = None) -> dict[str, Any]:
    """Architecture, sizes, quantization and safety of a folder; loads nothing.

    Args:
        host: holds third parties' plugins that know the folder.

    Raises:
        ModelError: the folder is invalid or of an unknown architecture.
    """
    host = host or PluginHost()
    source = open_any(resolve(model), host.registry.exporters.values())
    checkpoint = source.checkpoint
    described = describe_source(source, host.registry.layouts)
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    linears: dict[str, int] = {}
    for site in described.sites:
        linears[site.role] = linears.get(site.role, 0) + 1
    config = quantization_config(source.config)
    text = source.config.get("text_config") or {}
    files = sorted(p.name for p in checkpoint.folder.iterdir())
    return {
        **architecture(source.config),
        "layers": described.num_layers,
        "parameters": sum(math.prod(shape) for shape in source.shapes.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": dtypes,
        "quantization": config and config.get("quant_method"),
        "linears": linears,
        "experts": len({s.expert for s in described.sites if s.expert is not None}),
        "tied": bool(source.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        "mtp_tensors": len(described.mtp_tensors),
        "tokenizer": checkpoint.has_tokenizer,
        "safety": {
            "pickle": any(w.split(" ", 1)[0].endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")) for w in checkpoint.warnings),
            "remote_code": "auto_map" in source.config,
            "python_files": [name for name in files if name.endswith(".py")],
        },
        "warnings": checkpoint.warnings,
    }
