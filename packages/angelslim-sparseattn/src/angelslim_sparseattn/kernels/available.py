"""What this machine can run, each with the reason why not."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def triton_runs() -> tuple[bool, str]:
    """Whether Triton is installed."""
    ok = importlib.util.find_spec("triton") is not None
    return ok, "" if ok else "triton is not installed"


def triton_interprets() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    import triton

    return bool(triton.knobs.runtime.interpret)
