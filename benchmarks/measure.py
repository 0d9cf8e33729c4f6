"""Shared by the benchmark scripts: measure a whole child process, describe the machine, write results.

Imports neither torch nor transformers: the kernel counts the parent's resident memory at the fork into a child's peak.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive"}


@dataclass(frozen=True)
class Measured:
    """One finished process.

    Args:
        wall_s: seconds from start to exit.
        cpu_s: user plus system seconds, its own children included.
        peak_rss_mb: largest resident set, MB of 10**6 bytes.
        peak_address_mb: largest address space seen, MB; None if it was not watched.
        stdout: what it printed.
    """

    wall_s: float
    cpu_s: float
    peak_rss_mb: float
    peak_address_mb: float | None
    stdout: str


def environment(threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, offline, without a GPU, and with a fixed number of threads."""
    return {**os.environ, **CPU_ONLY, "OMP_NUM_THREADS": str(threads), **(extra or {})}


def measure(command: list[str], env: Mapping[str, str], *, preexec: Callable[[], None] | None = None, watch_address_space: bool = False) -> Measured:
    """Run a command as a whole process and read its resource usage from the kernel.

    Args:
        command: program and arguments.
        env: its environment.
        preexec: called in the child before the program starts, such as to set a limit.
        watch_address_space: poll the peak of its address space, every 20 ms.
    Raises:
        RuntimeError: it failed; the end of its standard error is in the message.
    """
    peak_kb = [0]
    # files, unlike pipes, never block the child
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        start = time.perf_counter()
        child = subprocess.Popen(command, env=dict(env), stdout=out, stderr=err, preexec_fn=preexec, start_new_session=True)
        watcher = threading.Thread(target=_watch, args=(child.pid, peak_kb), daemon=True)
        if watch_address_space:
            watcher.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if child.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ... ended with {child.returncode}: {(stderr or stdout)[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    address = peak_kb[0] * 1024 / 1e6 if watch_address_space else None
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6, address, stdout)


def _watch(pid: int, peak_kb: list[int]) -> None:
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # the process is gone
            return
        for line in status.splitlines():
            if line.startswith("VmPeak:"):
                peak_kb[0] = max(peak_kb[0], int(line.split()[1]))
        time.sleep(0.02)


def reason(error: RuntimeError) -> str:
    """The line of a failed process's output that says why, without what it advises."""
    lines = [line for line in str(error).strip().splitlines() if line.strip() and not line.startswith("hint:")]
    return lines[-1][:300]


def angelslim(*arguments: str) -> list[str]:
    """Command line of the `angelslim` that the running Python has."""
    if importlib.util.find_spec("angelslim_core") is None:
        raise SystemExit("install the packages into the environment that runs this script")
    return [sys.executable, "-m", "angelslim_core", *arguments]


def folder_mb(folder: Path) -> float:
    """Size of the weight files of a folder, in MB of 10**6 bytes."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6


def warm_cache(folder: Path) -> None:
    """Read a folder once, so that the first process measured does not pay for the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def versions(python: str, packages: Iterable[str]) -> dict[str, str]:
    """Versions of packages in another Python's environment, with Python's own."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    result: dict[str, str] = json.loads(subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout)
    return result


def machine() -> dict[str, Any]:
    """The machine in general terms: architecture, cores, memory, kernel family."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"arch": platform.machine(), "cores": os.cpu_count(), "ram_gb": round(memory / 1e9, 1), "system": platform.system()}


def median(values: Iterable[float]) -> float:
    """Median, to four significant digits."""
    return float(f"{statistics.median(values):.4g}")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document with the date and the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"schema_version": 1, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    path.write_text(json.dumps({**head, **document}, indent=2) + "\n")


def table(rows: list[list[str]], head: list[str]) -> None:
    """Print rows in aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def gpu_ms(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds between events of calls one straight after the other, a call's mean."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def waits(call: Callable[[], Any]) -> str | None:
    """Where the host waited for the GPU, or None."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return None
