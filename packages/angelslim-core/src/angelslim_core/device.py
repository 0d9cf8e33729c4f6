"""Which device a run uses, and how much memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def pick_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" takes a GPU if there is one.

    Raises:
        UsageError: cuda was asked for and there is none.
    """
    import torch

    if name == "cpu":
        return "cpu"
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError(6, "--device", "cuda was asked for, but torch sees no GPU")
    return "cuda" if available else "cpu"


def device_name(device: str) -> str:
    """Device with its compute capability, as `angelslim_default_steps` gets it."""
    if device == "cpu":
        return device
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}.{minor}"


def peak_ram_bytes() -> int:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_ram() -> None:
    """Give freed memory back to the system, which glibc keeps otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def map_large_pieces() -> None:
    """Give pieces of memory from 2 MB on pages of their own, which go back when freed; glibc raises the limit else, and the heap gets holes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 2 << 20)  # M_MMAP_THRESHOLD


def free_ram_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its control group (Linux)."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        available = min(available, limit - int(counts["anon"]))
    return available


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the machine's memory; of a GPU's tensor in page-locked memory, which it reads many times as fast."""
    import torch

    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU; torch reports the machine's as a RuntimeError."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
