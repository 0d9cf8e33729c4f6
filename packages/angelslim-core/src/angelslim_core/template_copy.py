"""`angelslim plugins new`: the template plugin under another name."""

from __future__ import annotations

import importlib.resources
import keyword
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import OutputError, UsageError
from .plugins import OFFICIAL

if TYPE_CHECKING:
    import sys

    if sys.version_info >= (3, 11):
        from importlib.resources.abc import Traversable
    else:
        from importlib.abc import Traversable

_NAME = "acme"


def copy_template(name: str, parent: Path | None = None) -> Path:
    """Write ./angelslim-NAME, an installable plugin with a pass and its tests.

    Raises:
        UsageError: the name is no lower-case identifier, or reserved.
        OutputError: the folder exists.
    """
    if not (name.isidentifier() and name.islower() and name.isascii()) or keyword.iskeyword(name) or name in ("core", *OFFICIAL):
        raise UsageError(21, name, "cannot be a plugin's name", "a lower-case identifier that is not one of the official plugins")
    folder = (parent or Path.cwd()) / f"angelslim-{name}"
    if folder.exists():
        raise OutputError(41, str(folder), "exists", "choose another name")
    _copy(importlib.resources.files(__package__) / "template", folder, name)
    return folder


def _copy(source: Traversable, target: Path, name: str) -> None:
    target.mkdir(parents=True)
    for item in source.iterdir():
        if item.name == "__pycache__":
            continue
        renamed = target / item.name.replace(_NAME, name)
        if item.is_dir():
            _copy(item, renamed, name)
        else:
            renamed.write_text(item.read_text(encoding="utf-8").replace(_NAME, name), encoding="utf-8")
