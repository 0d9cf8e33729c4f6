"""A checkpoint four times larger than the address space goes through a tensor pass.

    python benchmarks/streaming.py --checkpoint-gb 6 --work FOLDER --out benchmarks/results/streaming.json

Writes a Llama-shaped checkpoint of random bf16 weights in shards, then runs `angelslim run --use quant.int8_dynamic`
under RLIMIT_AS of a quarter of it, everything included: interpreter, libraries and threads. What `import torch`
alone takes is measured and reported too. Checks free disk first and deletes all it made.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from generated import generate
from measure import angelslim, environment, folder_mb, measure, table, versions, write

from angelslim_core.io.checkpoint import Checkpoint

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}  # each malloc arena reserves 64 MB of address space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-gb", type=float, default=6.0, help="size of the checkpoint, GB of 10**9 bytes; the limit is a quarter")
    parser.add_argument("--layers-per-shard", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help="folder on a disk with room for the checkpoint and its output; default: the system's temporary folder")
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    total = int(given.checkpoint_gb * 1e9)
    env = environment(given.threads, ONE_ARENA)
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=given.work) as work:
        free = shutil.disk_usage(work).free
        if free < 1.8 * total:
            raise SystemExit(f"needs {1.8 * total / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free: give another --work or a smaller --checkpoint-gb")
        bare = measure([sys.executable, "-c", "import torch, time; time.sleep(0.2)"], env, watch_address_space=True)
        model, out = Path(work) / "model", Path(work) / "out"
        size = generate(model, total, layers_per_shard=given.layers_per_shard)
        limit = size // 4
        command = angelslim("run", "--model", str(model), "--out", str(out), "--plugins", "quant", "--use", "quant.int8_dynamic", "--json")
        run = measure(command, env, preexec=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)), watch_address_space=True)
        report = json.loads(run.stdout)
        result = {
            "checkpoint_bytes": size,
            "shards": len(list(model.glob("*.safetensors"))),
            "largest_tensor_bytes": max(info.nbytes for info in Checkpoint.open(model).tensors.values()),
            "limit_bytes": limit,
            "checkpoint_over_limit": round(size / limit, 3),
            "peak_address_mb": round(run.peak_address_mb or 0, 1),
            "peak_rss_mb": round(run.peak_rss_mb, 1),
            "import_torch_address_mb": round(bare.peak_address_mb or 0, 1),
            "import_torch_rss_mb": round(bare.peak_rss_mb, 1),
            "wall_s": round(run.wall_s, 2),
            "cpu_s": round(run.cpu_s, 2),
            "gb_per_s": round(size / 1e9 / run.wall_s, 3),
            "output_mb": round(folder_mb(out), 1),
            "reported_peak_ram_bytes": report["peak_ram_bytes"],
        }
    packages = ["torch", "safetensors", "angelslim-core", "angelslim-quant"]
    write(Path(given.out), {"sample": {"runs": 1, "threads": given.threads}, "versions": versions(sys.executable, packages), "result": result})
    table([[key, str(value)] for key, value in result.items()], ["what", "measured"])


if __name__ == "__main__":
    main()
