"""Parameters kept in a work folder with some numbers, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from angelslim_core.errors import ModelError
from angelslim_core.io.checkpoint import dtype_name, read_bytes, read_header, torch_dtype
from angelslim_core.io.strict_json import read_json
from angelslim_core.io.writer import fsync_folder, write_json, write_tensors


def write_kept(folder: Path, parameters: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Keep parameters and numbers (JSON) in a folder, which appears when it is complete."""
    made = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    write_tensors(made / "parameters.safetensors", parameters)
    write_json(made / "numbers.json", dict(numbers))
    os.replace(made, folder)
    fsync_folder(folder.parent)


def read_kept(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Give parameters the values that were kept; the numbers, or None if there is no such folder.

    Raises:
        ModelError: it is of other parameters.
    """
    if not folder.is_dir():
        return None
    header = read_header(folder / "parameters.safetensors")
    specs = {name: (dtype_name(p.dtype), tuple(p.shape)) for name, p in parameters.items()}
    if {name: (info.dtype, info.shape) for name, info in header.items()} != specs:
        raise ModelError(942, str(folder), "holds other parameters than this run's", "delete it to begin anew")
    with torch.no_grad():
        for name, info in header.items():
            parameters[name].copy_(read_bytes(info.file, info.offset, info.nbytes).view(torch_dtype(info.dtype)).reshape(info.shape))
    return read_json(folder / "numbers.json")
