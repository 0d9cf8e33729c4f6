"""Calibrated schemes against their peers: quality, time and memory, each as a whole process on one machine.

    python benchmarks/quant_peers.py --model MODEL --offgrid OFFGRID --text TEXT --work FOLDER \
        --peer-python LLMCOMPRESSOR_ENV/bin/python --out benchmarks/results/quant_peers.json

Calibrates on windows of the second half of TEXT and scores windows from its start. 8-bit schemes run on MODEL, 4 bits
on OFFGRID (an ordinary model; MODEL's own weights lie on a 4-bit grid). The programs take turns, one run each; both
folders are read by the same evaluation. `--only` names rows; finished rows of an existing result are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from measure import angelslim, environment, folder_mb, measure, table, versions, warm_cache, write

PACKAGES = ["torch", "transformers", "compressed-tensors", "llmcompressor", "angelslim-core", "angelslim-quant"]
PEERS = Path(__file__).with_name("peers")
G64 = "group_size=64"


class Row(NamedTuple):
    """One line of the comparison.

    Args:
        base: "model" or "offgrid".
        use: our passes with their options.
        peer: method of the peer's script, or "" where a row stands alone.
    """

    base: str
    use: tuple[tuple[str, ...], ...]
    peer: str = ""


ROWS = {
    "int8 smooth": Row("model", (("quant.smooth",), ("quant.int8_dynamic",)), "smooth"),
    "fp8 static": Row("model", (("quant.fp8_static",),), "fp8_static"),
    "w4 g64 gptq": Row("offgrid", (("quant.gptq", G64),), "gptq"),
    "w4 g64 gptaq": Row("offgrid", (("quant.gptaq", G64),)),
    "w4 g64 awq asym": Row("offgrid", (("quant.awq", G64),), "awq"),
    "w4 g64 gptaq asym": Row("offgrid", (("quant.gptaq", G64, "symmetric=false"),)),
    "nvfp4 weight-only": Row("offgrid", (("quant.nvfp4", "weight_only=true"),), "nvfp4a16"),
}


def ours(row: Row, model: str, out: Path, given: argparse.Namespace) -> list[str]:
    """Our command line."""
    command = ["run", "--model", model, "--out", str(out), "--plugins", "quant"]
    for index, (use, *options) in enumerate(row.use):
        command += ["--use", use, *(part for option in options for part in ("--set", f"steps[{index}].with.{option}"))]
    for option in (f"data={given.calibration}", f"samples={given.samples}", f"tokens={given.tokens}", "batch_size=8"):
        command += ["--set", f"calibration.{option}"]
    return angelslim(*command)


def theirs(row: Row, model: str, out: Path, given: argparse.Namespace) -> list[str]:
    """The peer's command line."""
    script = [given.peer_python, str(PEERS / "llmcompressor_calibrated.py"), model, str(out), row.peer]
    return [*script, "--text", str(given.calibration), "--samples", str(given.samples), "--tokens", str(given.tokens)]


def side(command: list[str], model: str, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run one program and score what it saved."""
    shutil.rmtree(out, ignore_errors=True)
    run = measure(command, environment(given.threads))
    scored = angelslim("eval", str(out), "--base", model, "--text", given.text, "--windows", str(given.windows), "--length", str(given.length), "--json")
    document = json.loads(measure(scored, environment(given.threads)).stdout)
    found = {key: round(getattr(run, key), 2) for key in ("wall_s", "cpu_s", "peak_rss_mb")}
    found |= {key: document[key] for key in ("perplexity", "base_perplexity", "kl", "top1_agreement", "backend")}
    found["weights_mb"] = round(folder_mb(out), 2)
    shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "offgrid", "text", "work", "peer-python", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--only", default=",".join(ROWS))
    for name, default in (("samples", 64), ("tokens", 512), ("windows", 32), ("length", 1024), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    work, result = Path(given.work), Path(given.out)
    work.mkdir(parents=True, exist_ok=True)
    text = Path(given.text).read_text(encoding="utf-8")
    given.calibration = work / "calibration.txt"
    given.calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
    rows: dict[str, Any] = json.loads(result.read_text())["rows"] if result.is_file() else {}
    for name in given.only.split(","):
        row = ROWS[name]
        model = getattr(given, row.base)
        warm_cache(Path(model))
        rows[name] = {"base": row.base, "angelslim": side(ours(row, model, work / "ours", given), model, work / "ours", given)}
        if row.peer:
            rows[name]["llmcompressor"] = side(theirs(row, model, work / "theirs", given), model, work / "theirs", given)
        sample = {key: getattr(given, key) for key in ("samples", "tokens", "windows", "length", "threads")}
        used = {"peer": versions(given.peer_python, PACKAGES), "ours": versions(sys.executable, PACKAGES)}
        write(result, {"sample": {**sample, "text": Path(given.text).name}, "versions": used, "rows": rows})
    lines = [
        [
            name,
            by,
            *(f"{r[key]:.{digits}f}" for key, digits in (("kl", 4), ("perplexity", 3), ("weights_mb", 1), ("wall_s", 0), ("cpu_s", 0), ("peak_rss_mb", 0))),
        ]
        for name, sides in rows.items()
        for by, r in sides.items()
        if isinstance(r, dict)
    ]
    table(lines, ["scheme", "by", "KL", "perplexity", "MB", "wall s", "CPU s", "RSS MB"])


if __name__ == "__main__":
    main()
