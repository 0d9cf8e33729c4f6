"""An operation: a slow readable reference, faster implementations, and the choice between them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .errors import EngineError, UsageError


@cache
def triton_runs() -> tuple[bool, str]:
    """Whether Triton is installed, as `Implementation.available` asks."""
    ok = importlib.util.find_spec("triton") is not None
    return ok, "" if ok else "triton is not installed"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Args:
        name: "triton", "torch"...
        function: same signature as the reference.
        supports: called with the operation's arguments; (ok, why not).
        available: whether this machine can run it at all; (ok, why not).
        by_name: only for callers that name it, never for "auto".
    """

    name: str
    function: Callable[..., Any]
    supports: Callable[..., tuple[bool, str]] = lambda *args, **options: (True, "")
    available: Callable[[], tuple[bool, str]] = lambda: (True, "")
    by_name: bool = False


@dataclass(frozen=True)
class Kernel:
    """An operation. `implementations` are tried in order; the reference is used only when asked for by name.

    Args:
        op: "plugin.operation".
        reference: the definition of the operation.
        implementations: fastest first.
    """

    op: str
    reference: Callable[..., Any]
    implementations: tuple[Implementation, ...] = field(default=())

    def __call__(self, *args: Any, executor: str = "auto", **options: Any) -> Any:
        """Run the first implementation that supports the call, or the one named by `executor`.

        Raises:
            UsageError: no implementation has that name.
            EngineError: the named implementation, or with "auto" every one, refuses the call.
        """
        return self.choose(*args, executor=executor, **options).function(*args, **options)

    def choose(self, *args: Any, executor: str = "auto", **options: Any) -> Implementation:
        """The implementation that a call would run, for callers that make the same call many times.

        Raises:
            UsageError, EngineError: as calling.
        """
        if executor == "reference":
            return Implementation("reference", self.reference)
        candidates = [i for i in self.implementations if executor == i.name or (executor == "auto" and not i.by_name)]
        if not candidates and executor != "auto":
            names = ", ".join(["reference", *(i.name for i in self.implementations)])
            raise UsageError(33, self.op, f"no implementation {executor!r}", f"choose one of: {names}")
        refusals = []
        for candidate in candidates:
            ok, why = candidate.available()
            if ok:
                ok, why = candidate.supports(*args, **options)
            if ok:
                return candidate
            refusals.append(f"{candidate.name}: {why}")
        raise EngineError(1, self.op, "no implementation supports this call (" + "; ".join(refusals) + ")", 'executor="reference" is slow but always works')

    def describe(self) -> dict[str, Any]:
        """The entry of `angelslim kernels list`."""
        rows = [{"name": i.name, "ok": i.available()[0], "why": i.available()[1] or ("only by name" if i.by_name else "")} for i in self.implementations]
        return {"op": self.op, "implementations": [*rows, {"name": "reference", "ok": True, "why": ""}]}
