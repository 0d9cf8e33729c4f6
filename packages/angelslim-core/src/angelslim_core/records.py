"""The records that a run leaves inside its output, under `angelslim/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .io.strict_json import read_json

RECORDS = "angelslim"


def read_records(folder: Path) -> dict[str, Any]:
    """The JSON records of an artifact that are there, by file stem (hostile input)."""
    return {p.stem: read_json(p, 1 << 30) for p in sorted((folder / RECORDS).glob("*.json"))}
