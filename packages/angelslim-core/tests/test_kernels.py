"""The dispatcher: first implementation that supports the call, never silently the slow one."""

import pytest

from angelslim_core.errors import EngineError, UsageError
from angelslim_core.kernels import Implementation, Kernel

KERNEL = Kernel(
    "toy.add",
    lambda a, b: ("reference", a + b),
    (
        Implementation("missing", lambda a, b: ("missing", a + b), available=lambda: (False, "not installed")),
        Implementation("small", lambda a, b: ("small", a + b), supports=lambda a, b: (a < 10, "a is 10 or more")),
    ),
)


def test_takes_the_first_that_supports_the_call():
    assert KERNEL(1, 2) == ("small", 3)
    assert KERNEL(1, 2, executor="reference") == ("reference", 3)


def test_refuses_instead_of_falling_back():
    with pytest.raises(EngineError, match=r"missing: not installed; small: a is 10 or more"):
        KERNEL(11, 2)
    with pytest.raises(EngineError, match="not installed"):
        KERNEL(1, 2, executor="missing")
    with pytest.raises(UsageError, match="no implementation 'triton'"):
        KERNEL(1, 2, executor="triton")


def test_describes_itself():
    assert [(i["name"], i["ok"]) for i in KERNEL.describe()["implementations"]] == [("missing", False), ("small", True), ("reference", True)]


def test_auto_never_takes_what_runs_by_name():
    kernel = Kernel("toy.add", KERNEL.reference, (Implementation("exact", lambda a, b: ("exact", a + b), by_name=True), *KERNEL.implementations))
    assert kernel(1, 2) == ("small", 3) and kernel(11, 2, executor="exact") == ("exact", 13)
    with pytest.raises(EngineError, match=r"\(missing: not installed; small: a is 10 or more\)"):
        kernel(11, 2)
