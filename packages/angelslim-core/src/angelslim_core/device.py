"""Which device a run uses, and how much memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UsageError
from .io.checkpoint import page_locked

if TYPE_CHECKING:
    from torch import Tensor

Key = TypeVar("Key")


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


def peak_gpu_bytes() -> int:
    """Most memory of the GPU that this process's tensors have had so far; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def peaks() -> tuple[int, int]:
    """Both of them."""
    return peak_ram_bytes(), peak_gpu_bytes()


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
    if not tensor.is_cuda:
        return tensor
    return pinned(tensor).copy_(tensor)


class Worker:
    """Moves tensors between the machine and a GPU in a thread and a stream of its own; in a run on a CPU it does nothing.

    Attributes:
        device: this process's.
    """

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self._stream = torch.cuda.Stream() if device == "cuda" else None

    def start(self) -> None:
        """Called first in the thread, which else would use the first GPU."""
        import torch

        if self._stream:
            torch.cuda.set_device(self.device)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What is read inside comes into page-locked memory, from where it moves without a copy on the way."""
        with page_locked() if self._stream else contextlib.nullcontext(), self._streaming():
            yield

    def to_device(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Tensors on the device, arrived; whoever uses them there calls `take_over` first."""
        if not self._stream:
            return dict(tensors)
        with self._streaming():
            moved = {key: tensor.to(self.device, non_blocking=True) for key, tensor in tensors.items()}
        self._stream.synchronize()
        return moved

    def mark(self) -> Any:
        """For `to_host`: all that the calling thread has asked of the GPU."""
        import torch

        return torch.cuda.current_stream().record_event() if self._stream else None

    def to_host(self, tensor: Tensor, mark: Any) -> Tensor:
        """A tensor in the machine's memory, arrived, once the GPU has come to the mark."""
        if not tensor.is_cuda or not self._stream:
            return tensor
        with self._streaming():
            self._stream.wait_event(mark)
            host = pinned(tensor).copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return host

    def _streaming(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(self._stream)  # does nothing for None


def take_over(tensors: Iterable[Tensor]) -> None:
    """Their memory is used by this thread's stream from now on and not to be given away before it is done."""
    import torch

    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())


def pinned(tensor: Tensor) -> Tensor:
    """Uninitialized page-locked memory for a copy."""
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU; torch reports the machine's as a RuntimeError."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
