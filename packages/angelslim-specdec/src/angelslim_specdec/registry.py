"""Drafts and training-free drafters by name; third parties add theirs through the hooks below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from angelslim_core.errors import ModelError, PluginError, UsageError
from angelslim_core.hookspecs import hookspec

if TYPE_CHECKING:
    from .drafters.base import Drafter
    from .drafts.base import Draft

_DRAFTS: dict[str, tuple[type[Draft], str]] = {}
_DRAFTERS: dict[str, tuple[type[Drafter], str]] = {}


class Hooks:
    """Hooks that this plugin adds."""

    @staticmethod
    @hookspec(historic=True)
    def angelslim_specdec_drafts(register: Any) -> None:
        """Call `register(DraftClass, owner)` for each draft model."""

    @staticmethod
    @hookspec(historic=True)
    def angelslim_specdec_drafters(register: Any) -> None:
        """Call `register(name, DrafterClass, owner)` for each drafter without weights."""


def add_draft(draft: type[Draft], owner: str) -> None:
    """Make a draft known by its name and architecture.

    Raises:
        PluginError: both are taken by another class.
    """
    for other, of in _DRAFTS.values():
        if other is not draft and (other.name == draft.name or other.architecture == draft.architecture):
            raise PluginError(700, f"{owner}: {draft.name}", f"is taken: {other.__name__} of {of} has that name or architecture")
    _DRAFTS[draft.name] = (draft, owner)


def add_drafter(name: str, drafter: type[Drafter], owner: str) -> None:
    """Make a training-free drafter known.

    Raises:
        PluginError: the name is taken.
    """
    if name in _DRAFTERS and _DRAFTERS[name][0] is not drafter:
        raise PluginError(701, f"{owner}: {name}", f"is taken by {_DRAFTERS[name][1]}")
    _DRAFTERS[name] = (drafter, owner)


def offer(manager: pluggy.PluginManager) -> None:
    """Let plugins, those loaded later among them, add theirs."""
    manager.add_hookspecs(Hooks)
    manager.hook.angelslim_specdec_drafts.call_historic(kwargs={"register": add_draft})
    manager.hook.angelslim_specdec_drafters.call_historic(kwargs={"register": add_drafter})


def _own() -> None:
    from .drafters import DRAFTERS
    from .drafts import DRAFTS

    for draft in DRAFTS:
        add_draft(draft, "specdec")
    for name, drafter in DRAFTERS.items():
        add_drafter(name, drafter, "specdec")


def drafts() -> dict[str, type[Draft]]:
    """By name."""
    _own()
    return {name: draft for name, (draft, _) in _DRAFTS.items()}


def drafters() -> dict[str, type[Drafter]]:
    """Without weights, by name."""
    _own()
    return {name: drafter for name, (drafter, _) in _DRAFTERS.items()}


def draft_named(name: str) -> type[Draft]:
    """
    Raises:
        UsageError: there is none.
    """
    found = drafts()
    if name not in found:
        raise UsageError(702, name, "is no draft model", f"there are {', '.join(sorted(found))}")
    return found[name]


def draft_of(architectures: Sequence[str], where: str) -> type[Draft]:
    """The draft of a config's `architectures`.

    Raises:
        ModelError: none has it.
    """
    for draft in drafts().values():
        if list(architectures) == [draft.architecture]:
            return draft
    raise ModelError(
        703, where, f"architectures {list(architectures)!r:.200} are no draft's", f"there are {', '.join(sorted(d.architecture for d in drafts().values()))}"
    )
