"""Tasks of long contexts, generated from a seed: one file a task, named as in RULER (arXiv:2404.06654)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from angelslim_core.errors import UsageError

if TYPE_CHECKING:
    from .base import Task

CLASSES = {
    "niah_single": "NiahSingle",
    "niah_multikey_1": "NiahMultikey1",
    "niah_multikey_2": "NiahMultikey2",
    "niah_multivalue": "NiahMultivalue",
    "niah_multiquery": "NiahMultiquery",
    "vt": "VariableTracking",
    "cwe": "CommonWords",
    "fwe": "FrequentWords",
}


def make_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UsageError: no such task.
    """
    if name not in CLASSES:
        raise UsageError(595, "tasks", f"no task {name!r:.100}", f"choose among: {', '.join(CLASSES)}")
    task: Task = getattr(import_module(f".{name}", __name__), CLASSES[name])()
    return task
