"""The records that a run leaves inside its output, under `angelslim/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import ModelError
from .hookspecs import OFFICIAL
from .io.strict_json import read_json

RECORDS = "angelslim"


def read_records(folder: Path) -> dict[str, Any]:
    """The JSON records of an artifact that are there, by file stem (hostile input)."""
    return {p.stem: read_json(p, 1 << 30) for p in sorted((folder / RECORDS).glob("*.json"))}


def plugins_hint(folder: Path, otherwise: str = "") -> str:
    """Which option loads the third parties' plugins that a folder's records name, or `otherwise` if they name none."""
    try:
        named = read_json(folder / RECORDS / "provenance.json").get("plugins")
    except ModelError:
        return otherwise
    found = [p for p in named if isinstance(p, dict) and p.get("id") not in OFFICIAL] if isinstance(named, list) else []
    ids = [i for p in found if re.fullmatch(r"[\w-]{1,60}", i := str(p.get("id")))]
    if not ids:
        return otherwise
    dists = ", ".join(re.sub(r"[^\w.-]", "", str(p.get("dist")))[:60] for p in found)
    return f"its records name third parties' plugins ({dists}); if you trust them: --plugins {','.join(ids)}"
