"""Several processes of one run, as torchrun starts them: each takes a share of the calibration batches and of the files written.

Whatever they must agree on goes through a `Group`. Before each exchange the processes tell each other whether they are
well, so that an error of one ends all, with its message. Where exchanges are far apart, `is_over` says that one waits there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from .errors import AngelslimError, ResourceError, UsageError, error_from

if TYPE_CHECKING:
    from torch import Tensor

# processes wait for the one that works longest; torchrun ends them all if one dies
_PATIENCE = timedelta(days=30)


class Group:
    """The processes of a run; this class is the group of one.

    Attributes:
        rank: number of this process; the first, 0, makes the folder of the output.
        size: number of processes.
    """

    rank = 0
    size = 1

    def reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Sum or maximum over the processes, which must all call it in the same order; may be done in place."""
        return tensor

    def share(self, value: Any) -> Any:
        """The first process's value (JSON) in all processes."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values (JSON) of all processes, by rank."""
        return [value]

    def meet(self) -> None:
        """Wait until all processes are here, all of them well: before they exchange by other means, where an error of one would leave the others waiting."""

    def is_over(self) -> bool:
        """Whether another process has failed and waits for this one's next exchange, which will say why."""
        return False

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error inside that ends this process ends the others at their next exchange."""
        yield


class Joined(Group):
    """Processes that exchange through torch.distributed: gloo, and NCCL for what lies on a GPU."""

    def __init__(self, device: str) -> None:
        import torch
        import torch.distributed as dist

        if device == "cuda":
            local, have = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
            if local > have:
                raise UsageError(300, "torchrun", f"{local} processes on a machine with {have} GPUs", "give --nproc-per-node at most their number")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=_PATIENCE))
        self._store = dist.PrefixStore("angelslim", store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE)
        # only we hold this one, so that its threads end with us: the default one stays in defaults of functions that torch imports late, and in meshes
        self._own: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._dist, self._torch = dist, torch
        self._over = False

    def reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        tensor = tensor.contiguous()
        with self._exchange():
            group = self._own if tensor.device.type == "cpu" else None
            self._dist.all_reduce(tensor, self._dist.ReduceOp.SUM if op == "sum" else self._dist.ReduceOp.MAX, group)
        return tensor

    def share(self, value: Any) -> Any:
        return self._gather(value if self.rank == 0 else None)[0]

    def gather(self, value: Any) -> list[Any]:
        return self._gather(value)

    def meet(self) -> None:
        with self._exchange():
            pass

    def is_over(self) -> bool:
        try:
            return bool(self._store.check(["over"]))
        except RuntimeError:  # the connection broke: so will the next exchange
            return True

    def _gather(self, value: Any) -> list[Any]:
        data = json.dumps(value).encode()
        with self._exchange():
            return [json.loads(part) for part in self._bytes(data)]

    def _bytes(self, data: bytes) -> list[bytes]:
        torch = self._torch
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(data)
        self._dist.all_reduce(lengths, group=self._own)
        found = []
        for rank, length in enumerate(lengths.tolist()):
            part = torch.zeros(length, dtype=torch.uint8)
            if rank == self.rank and data:
                part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if length:
                self._dist.broadcast(part, rank, self._own)
            found.append(bytes(part.numpy().tobytes()))
        return found

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """An exchange in which all processes take part, if all are well."""
        try:
            problems = self._bytes(b"")
            if not any(problems):
                yield
                return
        except RuntimeError as error:  # a connection that broke
            self._over = True
            raise ResourceError(300, "torchrun", "another process of this run ended without a word", "its own output may say why") from error
        self._over = True
        raise error_from(json.loads(next(p for p in problems if p)))

    @contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._over:
                self._over = True
                bug = AngelslimError(301, f"process {self.rank}", f"{type(error).__name__}: {error}", "this is a bug of ours")
                known = error if isinstance(error, AngelslimError) else bug
                with suppress(RuntimeError):  # nobody may be left to hear it
                    self._store.set("over", "1")
                    self._bytes(json.dumps(known.as_dict()).encode())
            raise

    def leave(self, together: bool) -> None:
        """End the connection, and the threads that carried what was exchanged.

        One that still held a tensor when the interpreter ends could not give it back, and would abort the process.

        Args:
            together: once all have come here; torchrun ends the others as soon as one process has failed.
        """
        if together:
            with suppress(RuntimeError):
                self._bytes(b"")
        self._dist.destroy_process_group(self._own)
        self._own = None  # the last reference: waits for its threads
        with suppress(RuntimeError):
            self._dist.destroy_process_group()


def of_several() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_joined() -> bool:
    """Whether this process is connected with others."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process speaks for the run."""
    return not of_several() or os.environ["RANK"] == "0"


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The processes of this run; an error inside ends all of them.

    Args:
        device: "cpu" or "cuda"; every process takes the GPU of its own number.
    """
    if not of_several():
        yield Group()
        return
    group = Joined(device)
    try:
        with group.telling():
            yield group
    except Exception:
        group.leave(together=True)
        raise
    except BaseException:
        group.leave(together=False)
        raise
    group.leave(together=True)
