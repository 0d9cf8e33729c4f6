"""Memory and resumption of quant.daq on a generated pair: a block-FP8 base, some scales in other shards, and what was trained from it.

    python benchmarks/daq_memory.py --gb 20 --work FOLDER --out benchmarks/results/daq_memory.json

The trained model has `--gb` GB in BF16, its base half of that. One run is unbroken; another is killed at a third of its
time, run again, and must end with the same bytes. Disk: 2.5 times `--gb`. All of it is deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from generated import generate, twin
from measure import angelslim, environment, machine, measure, write

from angelslim_core.io.checkpoint import Checkpoint


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work")
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    env = environment(given.threads)
    with tempfile.TemporaryDirectory(prefix="daq-", dir=given.work) as work:
        base, post, out, again = (Path(work) / name for name in ("base", "post", "out", "again"))
        free, need = shutil.disk_usage(work).free, 2.6e9 * given.gb
        if free < need:
            raise SystemExit(f"needs {need / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free: give another --work or a smaller --gb")
        sizes = generate(base, int(given.gb / 2 * 1e9), fp8=True), twin(base, post)

        def command(folder: Path) -> list[str]:
            options = ("--set", f"steps[0].with.base={base}", "--device", "cpu", "--json")
            return angelslim("run", "--model", str(post), "--out", str(folder), "--plugins", "quant", "--use", "quant.daq", *options)

        run = measure(command(out), env)
        report = json.loads(run.stdout)
        process = subprocess.Popen(command(again), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(run.wall_s / 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(list(Path(work).glob(".again.angelslim/stage/*.safetensors")))
        resumed = measure(command(again), env)
        result = {
            "machine": machine(),
            "threads": given.threads,
            "post_bytes": sizes[1],
            "base_bytes": sizes[0],
            "largest_tensor_bytes": max(info.nbytes for info in Checkpoint.open(post).tensors.values()),
            "wall_s": round(run.wall_s, 1),
            "cpu_s": round(run.cpu_s, 1),
            "peak_rss_mb": round(run.peak_rss_mb, 1),
            "gb_per_minute": round(sizes[1] / 1e9 / run.wall_s * 60, 2),
            "cosine": report["passes"][0]["metrics"]["cosine"],
            "cosine_absmax": report["passes"][0]["metrics"]["cosine_absmax"],
            "killed_with_shards": kept,
            "resumed_wall_s": round(resumed.wall_s, 1),
            "resumed_peak_rss_mb": round(resumed.peak_rss_mb, 1),
            "same_bytes": digests(out) == digests(again),
        }
    write(Path(given.out), result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
