"""A model by folder or hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import ModelError

_HUB_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """Local folder of a model; a hub id is downloaded into the hub's cache (weights as safetensors only).

    A path that exists never touches the network.

    Raises:
        ModelError: no such folder, and no hub id or the hub cannot be reached.
    """
    if Path(model).exists():
        return Path(model)
    if not _HUB_ID.fullmatch(str(model)):
        raise ModelError(89, str(model), "is no folder and no hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=PATTERNS))
    except Exception as error:
        how = "offline" if is_offline_mode() or os.environ.get("HF_HUB_OFFLINE") else f"{type(error).__name__}"
        raise ModelError(90, str(model), f"is no folder here, and fetching it from the hub failed ({how})", "check the name, or give a local folder") from error
