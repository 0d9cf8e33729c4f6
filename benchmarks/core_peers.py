"""Data-free schemes against llm-compressor: time, memory, size and quality, as whole processes in turn on one machine.

    python benchmarks/core_peers.py --model MODEL --text TEXT --peer-python LLMCOMPRESSOR_ENV/bin/python \
        --windows 32 --length 1024 --repeats 3 --out benchmarks/results/core_peers.json

Runs in the environment that holds angelslim-core and angelslim-quant. For each scheme the two programs take turns
(ours, theirs, ours, theirs, ...), each from a fresh process to the saved folder; the kernel reports CPU time and
peak memory. Both folders are then read by the same evaluation on the same windows.
`--wait-for-idle` holds back each timed process until the machine is otherwise quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import angelslim, environment, folder_mb, measure, median, table, versions, warm_cache, write

PACKAGES = ["torch", "transformers", "compressed-tensors", "safetensors", "llmcompressor", "angelslim-core", "angelslim-quant"]
SCHEMES = ("int8_dynamic", "fp8_dynamic", "int4_rtn")
GROUP_SIZE = 64
PEER = Path(__file__).with_name("peers") / "llmcompressor_quantize.py"


def commands(scheme: str, model: str, peer_python: str, outs: dict[str, Path]) -> dict[str, list[str]]:
    """Command line of each side for one scheme."""
    ours = angelslim("run", "--model", model, "--out", str(outs["angelslim"]), "--plugins", "quant", "--use", f"quant.{scheme}")
    if scheme == "int4_rtn":
        ours += ["--set", f"steps[0].with.group_size={GROUP_SIZE}"]
    theirs = [peer_python, str(PEER), model, str(outs["llmcompressor"]), scheme, "--group-size", str(GROUP_SIZE)]
    return {"angelslim": ours, "llmcompressor": theirs}


def wait_for_idle(share: float = 0.15, patience_s: float = 600) -> None:
    """Wait until all cores together were busy for less than `share` of two seconds."""

    def busy() -> tuple[int, int]:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        before = busy()
        time.sleep(2)
        after = busy()
        if (after[0] - before[0]) < share * (after[1] - before[1]):
            return
    print(f"the machine was not idle for {patience_s:.0f} s; measuring all the same", flush=True)


def evaluate(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Quality of a folder against the base, by `angelslim eval`."""
    command = angelslim(
        "eval", str(folder), "--base", given.model, "--text", given.text, "--windows", str(given.windows), "--length", str(given.length), "--json"
    )
    document = json.loads(measure(command, environment(given.threads)).stdout)
    return {key: document[key] for key in ("perplexity", "base_perplexity", "kl", "top1_agreement", "tokens", "backend")}


def compare(scheme: str, given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both sides of one scheme: `repeats` runs in turn, then quality of the last folders."""
    outs = {side: work / f"{side}-{scheme}" for side in ("angelslim", "llmcompressor")}
    samples: dict[str, list[Any]] = {side: [] for side in outs}
    for _ in range(given.repeats):
        for side, command in commands(scheme, given.model, given.peer_python, outs).items():
            shutil.rmtree(outs[side], ignore_errors=True)
            if given.wait_for_idle:
                wait_for_idle()
            samples[side].append(measure(command, environment(given.threads)))
    result: dict[str, Any] = {}
    for side, out in outs.items():
        runs = samples[side]
        result[side] = {
            **{key: median(getattr(run, key) for run in runs) for key in ("wall_s", "cpu_s", "peak_rss_mb")},
            **{f"{key}_samples": [round(getattr(run, key), 2) for run in runs] for key in ("wall_s", "cpu_s", "peak_rss_mb")},
            "weights_mb": round(folder_mb(out), 2),
            **evaluate(out, given),
        }
        if not given.keep:
            shutil.rmtree(out)
    result["ratio"] = {
        key: round(result["angelslim"][key] / result["llmcompressor"][key], 4) for key in ("wall_s", "cpu_s", "peak_rss_mb", "weights_mb", "kl", "perplexity")
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--peer-python", required=True, help="Python of an environment with llmcompressor")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wait-for-idle", action="store_true")
    parser.add_argument("--keep", help="folder in which the compressed models stay, for reload.py and engines.py")
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    given.model = os.path.abspath(given.model)
    warm_cache(Path(given.model))
    work = Path(given.keep or tempfile.mkdtemp(prefix="core-peers-"))
    try:
        schemes = {scheme: compare(scheme, given, work) for scheme in given.schemes.split(",")}
    finally:
        if not given.keep:
            shutil.rmtree(work)
    document = {
        "sample": {
            "repeats": given.repeats,
            "windows": given.windows,
            "length": given.length,
            "threads": given.threads,
            "text": Path(given.text).name,
            "int4_group_size": GROUP_SIZE,
        },
        "versions": {"peer": versions(given.peer_python, PACKAGES), "ours": versions(sys.executable, PACKAGES)},
        "schemes": schemes,
    }
    write(Path(given.out), document)
    rows = [
        [
            scheme,
            side,
            *(f"{r[key]:.{digits}f}" for key, digits in (("wall_s", 2), ("cpu_s", 2), ("peak_rss_mb", 0), ("weights_mb", 1), ("perplexity", 3), ("kl", 5))),
            f"{100 * r['top1_agreement']:.2f}",
        ]
        for scheme, result in schemes.items()
        for side, r in result.items()
        if side != "ratio"
    ]
    table(rows, ["scheme", "by", "wall s", "CPU s", "RSS MB", "MB", "perplexity", "KL", "top-1 %"])
    for scheme, result in schemes.items():
        print(f"{scheme}: " + ", ".join(f"{key} x{value}" for key, value in result["ratio"].items()))


if __name__ == "__main__":
    main()
