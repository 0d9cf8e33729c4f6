"""Strategies by name; each has a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from angelslim_core.errors import UsageError

from .base import Strategy

# file -> class
CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "random": "Random",
        "divprune": "DivPrune",
        "scope": "SaliencyCoverage",
        "vispruner": "VisPruner",
        "vispruner_audio": "VisPrunerAudio",
        "hiprune": "HiPrune",
        "visionzip": "VisionZip",
        "visionzip_audio": "VisionZipAudio",
        "prunesid": "PruneSID",
        "id_selection": "IDSelection",
        "fastv": "FastV",
        "dart": "Dart",
        "pyramiddrop": "PyramidDrop",
        "samp": "Samp",
        "atome": "AToMe",
        "fastadasp": "FastAdaSP",
        "segmentwise": "Segmentwise",
        "cdpruner": "CDPruner",
        "idpruner": "IDPruner",
        "vision_selector": "VisionSelector",
    }
)


def strategy_class(name: str) -> type[Strategy]:
    """
    Raises:
        UsageError: there is none of that name.
    """
    if name not in CLASSES:
        raise UsageError(801, "strategy", f"no strategy {name!r:.50}", f"choose one of: {', '.join(CLASSES)}")
    found: type[Strategy] = getattr(import_module(f".{name}", __name__), CLASSES[name])
    return found


def make_strategy(name: str, **options: Any) -> Strategy:
    """A strategy with these options.

    Raises:
        UsageError: an unknown name or option, or a value out of range.
    """
    kind = strategy_class(name)
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(802, ".".join([name, *map(str, first["loc"])]), first["msg"].removeprefix("Value error, ")) from error
