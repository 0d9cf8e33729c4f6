"""quant.daq end to end on a GPU against what the disk gives: a generated pair of BF16 checkpoints, read cold.

    python benchmarks/daq_stream.py --gb 10 --device cuda --work FOLDER --out benchmarks/results/daq_stream.json

Base and trained model have `--gb` GB each, with Llama-3.1-8B's shapes. What the disk gives is measured beside: reading all input in
order, with as many readers as do best, and writing and flushing as many bytes as the result has, one after the other. Pages are
dropped from the cache before each reading and each run. The first run compiles kernels, which the machine keeps; `share_of_disk` is
the seconds the disk alone takes over those of a run, `share_of_reading` of reading alone, with the start of the program and without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from generated import Shape, generate, twin
from measure import angelslim, folder_mb, machine, measure, write

SHAPE = Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8)
BLOCK = 16 << 20


def drop(files: Sequence[Path]) -> None:
    """Let the system forget the pages of files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(file: Path) -> int:
    buffer, total = bytearray(BLOCK), 0
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            total += count
    return total


def read_rate(files: Sequence[Path], readers: int) -> float:
    """GB a second."""
    drop(files)
    start = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        total = sum(pool.map(read, files))
    return total / 1e9 / (time.perf_counter() - start)


def write_rate(file: Path, size: int) -> float:
    """GB a second, until it is on the disk."""
    block = os.urandom(BLOCK)
    start = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for _ in range(max(1, size // BLOCK)):
            stream.write(block)
        os.fsync(stream.fileno())
    rate = file.stat().st_size / 1e9 / (time.perf_counter() - start)
    file.unlink()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work")
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="daq-", dir=given.work) as work:
        base, post, out = (Path(work) / name for name in ("base", "post", "out"))
        free, need = shutil.disk_usage(work).free, 2.7e9 * given.gb
        if free < need:
            raise SystemExit(f"needs {need / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free: give another --work or a smaller --gb")
        generate(base, int(given.gb * 1e9), layers_per_shard=2, shape=SHAPE)
        twin(base, post)
        files = sorted((*base.glob("*.safetensors"), *post.glob("*.safetensors")))
        size = sum(f.stat().st_size for f in files)
        reading = {str(n): round(read_rate(files, n), 3) for n in (1, 4)}
        options = ("--set", f"steps[0].with.base={base}", "--device", given.device, "--json")
        command = angelslim("run", "--model", str(post), "--out", str(out), "--plugins", "quant", "--use", "quant.daq", *options)
        runs = []
        for _ in range(2):
            shutil.rmtree(out, ignore_errors=True)
            drop(files)
            run = measure(command, dict(os.environ))
            seconds = json.loads(run.stdout)["passes"][0]["seconds"]
            runs.append({"wall_s": round(run.wall_s, 2), "pass_s": round(seconds, 2), "peak_rss_mb": round(run.peak_rss_mb, 1)})
        written = int(folder_mb(out) * 1e6)
        writing = write_rate(Path(work) / "blank", written)
        reads = size / 1e9 / max(reading.values())
        both = reads + written / 1e9 / writing
        for row in runs:
            row["gb_per_s"] = round(size / 1e9 / row["wall_s"], 3)
            row["share_of_disk"], row["share_of_reading"] = round(both / row["wall_s"], 3), round(reads / row["wall_s"], 3)
            row["share_of_disk_without_start"] = round(both / row["pass_s"], 3)
        result = {
            "machine": machine(),
            "device": given.device,
            "input_bytes": size,
            "output_bytes": written,
            "disk_read_gb_per_s": reading,
            "disk_write_gb_per_s": round(writing, 3),
            "disk_alone_s": round(both, 2),
            "first_run": runs[0],
            "second_run": runs[1],
        }
    write(Path(given.out), result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
