"""Operations where time goes: a readable reference each, and faster implementations beside it."""

from __future__ import annotations

import importlib.util


def installed() -> tuple[bool, str]:
    """Whether Triton is; (ok, why not)."""
    ok = importlib.util.find_spec("triton") is not None
    return ok, "" if ok else "triton is not installed"
