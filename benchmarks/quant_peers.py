"""Calibrated schemes against their peers: quality, time and memory, each as a whole process on one machine.

    python benchmarks/quant_peers.py --model MODEL --offgrid OFFGRID --text TEXT --work FOLDER \
        --llmcompressor LLMCOMPRESSOR_ENV/bin/python --autoround AUTOROUND_ENV/bin/python \
        --gptqmodel GPTQMODEL_ENV/bin/python --out benchmarks/results/quant_peers.json

Calibrates on windows of the second half of TEXT and scores windows from its start. 8-bit schemes run on MODEL, 4 bits
on OFFGRID (an ordinary model; MODEL's own weights lie on a 4-bit grid). The programs take turns, one run each; both
folders are read by the same evaluation. `--only` names rows and `--by` programs; what an existing result holds stays,
unless a row was measured with other settings. A run that fails leaves its error, and the others go on. A program
without a Python of its environment is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from measure import angelslim, environment, folder_mb, measure, reason, table, versions, warm_cache, write

PEERS = Path(__file__).with_name("peers")
SCRIPTS = {"llmcompressor": "llmcompressor_calibrated.py", "autoround": "autoround_quantize.py", "gptqmodel": "gptqmodel_quantize.py"}
PACKAGES = ["torch", "transformers", "compressed-tensors", "llmcompressor", "auto-round", "gptqmodel", "angelslim-core", "angelslim-quant"]
US = "angelslim"
G64 = "group_size=64"
MEASURED = {"kl": 4, "perplexity": 3, "weights_mb": 1, "wall_s": 0, "cpu_s": 0, "peak_rss_mb": 0}


class Row(NamedTuple):
    """One line of the comparison.

    Args:
        base: "model" or "offgrid".
        use: our passes with their options.
        peers: (program, method of its script).
    """

    base: str
    use: tuple[tuple[str, ...], ...]
    peers: tuple[tuple[str, str], ...] = ()


ROWS = {
    "int8 smooth": Row("model", (("quant.smooth",), ("quant.int8_dynamic",)), (("llmcompressor", "smooth"),)),
    "fp8 static": Row("model", (("quant.fp8_static",),), (("llmcompressor", "fp8_static"),)),
    "fp8 static gptq": Row("model", (("quant.fp8_static", "gptq=true"),), (("llmcompressor", "fp8_static"),)),
    "fp8 cache per tensor": Row("model", (("quant.kv_fp8",),), (("llmcompressor", "kv_fp8"),)),
    "fp8 cache per head": Row("model", (("quant.kv_fp8", "granularity=head"),), (("llmcompressor", "kv_fp8_head"),)),
    "w4 g64 gptq": Row("offgrid", (("quant.gptq", G64),), (("llmcompressor", "gptq"), ("llmcompressor", "gptq_no_order"), ("gptqmodel", "w4"))),
    "w4 g64 gptaq": Row("offgrid", (("quant.gptaq", G64),), (("gptqmodel", "gptaq"),)),
    "w4 g64 gptaq asym": Row("offgrid", (("quant.gptaq", G64, "symmetric=false"),)),
    "w4 g64 awq asym": Row("offgrid", (("quant.awq", G64),), (("llmcompressor", "awq"),)),
    "w4 g64 learned rounding": Row("offgrid", (("quant.learned_rounding", G64),), (("autoround", "w4"),)),
    "w4 g64 learned rounding asym": Row("offgrid", (("quant.learned_rounding", G64, "symmetric=false"),), (("autoround", "w4_asym"),)),
    "w4 g64 learned rounding asym 50 steps": Row(
        "offgrid", (("quant.learned_rounding", G64, "symmetric=false", "iterations=50"),), (("autoround", "w4_asym"),)
    ),
    "w4 g64 rotated learned rounding asym": Row("offgrid", (("quant.rotate",), ("quant.learned_rounding", G64, "symmetric=false"))),
    "nvfp4": Row("offgrid", (("quant.nvfp4",),), (("llmcompressor", "nvfp4"), ("autoround", "nvfp4"))),
    "nvfp4 nearest": Row("offgrid", (("quant.nvfp4", "gptq=false"),), (("llmcompressor", "nvfp4"),)),
    "nvfp4 weight-only": Row("offgrid", (("quant.nvfp4", "weight_only=true"),), (("llmcompressor", "nvfp4a16"),)),
    "nvfp4 weight-only nearest": Row("offgrid", (("quant.nvfp4", "weight_only=true", "gptq=false"),), (("llmcompressor", "nvfp4a16"),)),
}


def ours(row: Row, model: str, out: Path, given: argparse.Namespace) -> list[str]:
    """Our command line."""
    command = ["run", "--model", model, "--out", str(out), "--plugins", "quant", "--device", given.device]
    for index, (use, *options) in enumerate(row.use):
        command += ["--use", use, *(part for option in options for part in ("--set", f"steps[{index}].with.{option}"))]
    for option in (f"data={given.calibration}", f"samples={given.samples}", f"tokens={given.tokens}"):
        command += ["--set", f"calibration.{option}"]
    return angelslim(*command)


def theirs(program: str, method: str, model: str, out: Path, given: argparse.Namespace) -> list[str]:
    """A peer's command line."""
    script = [getattr(given, program), str(PEERS / SCRIPTS[program]), model, str(out), method]
    script += ["--text", str(given.calibration), "--samples", str(given.samples), "--tokens", str(given.tokens)]
    return script + (["--iterations", str(given.iterations), "--device", given.device] if program == "autoround" else [])


def side(command: list[str], model: str, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run one program and score what it saved; or why it failed."""
    shutil.rmtree(out, ignore_errors=True)
    scored = angelslim("eval", str(out), "--base", model, "--text", given.text, "--windows", str(given.windows), "--length", str(given.length), "--json")
    env = environment(given.threads, {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")} if given.device == "cuda" else {})
    try:
        run = measure(command, env)
        size = round(folder_mb(out), 2)
        document = json.loads(measure(scored, env).stdout)
    except RuntimeError as error:
        return {"error": reason(error)}
    finally:
        if not given.keep:
            shutil.rmtree(out, ignore_errors=True)
    found = {key: round(getattr(run, key), 2) for key in ("wall_s", "cpu_s", "peak_rss_mb")}
    found |= {key: document[key] for key in ("perplexity", "base_perplexity", "kl", "kl_stderr", "top1_agreement", "backend")}
    return {**found, "weights_mb": size}


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours to the best peer's, figure by figure."""
    us, peers = sides.get(US, {}), [s for by, s in sides.items() if by != US and "kl" in s]
    if not peers or "kl" not in us:
        return {}
    return {key: round(us[key] / min(peer[key] for peer in peers), 3) for key in ("kl", "wall_s", "cpu_s", "peak_rss_mb")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "offgrid", "text", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in SCRIPTS:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"Python of an environment with {name}")
    parser.add_argument("--only", default=",".join(ROWS), help="names of rows, separated by commas")
    parser.add_argument("--by", default=",".join((US, *SCRIPTS)), help="programs to run")
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round; its default")
    for name, default in (("samples", 64), ("tokens", 512), ("windows", 32), ("length", 1024), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of AngelSlim and auto-round; the others take a GPU where there is one")
    parser.add_argument("--keep", action="store_true", help="leave the folders in --work")
    given = parser.parse_args()
    work, result = Path(given.work), Path(given.out)
    work.mkdir(parents=True, exist_ok=True)
    text = Path(given.text).read_text(encoding="utf-8")
    given.calibration = work / "calibration.txt"
    given.calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
    programs = [program for program in given.by.split(",") if program == US or getattr(given, program)]
    used = {program: versions(sys.executable if program == US else getattr(given, program), PACKAGES) for program in programs}
    sample = {key: getattr(given, key) for key in ("samples", "tokens", "windows", "length", "threads", "device")} | {"text": Path(given.text).name}
    document = json.loads(result.read_text()) if result.is_file() else {"versions": {}, "rows": {}}
    rows: dict[str, Any] = document["rows"]
    for name in given.only.split(","):
        row = ROWS[name]
        model = getattr(given, row.base)
        warm_cache(Path(model))
        if rows.get(name, {}).get("sample") != sample:
            rows[name] = {"base": row.base, "sample": sample, "sides": {}}
        for program, method in ((US, ""), *row.peers):
            if program not in programs:
                continue
            by = f"{program} {method}".strip()
            out = work / f"{name} {by}".replace(" ", "-")
            command = ours(row, model, out, given) if program == US else theirs(program, method, model, out, given)
            settings = {"iterations": given.iterations} if program == "autoround" else {}
            rows[name]["sides"][by] = {**settings, **side(command, model, out, given)}
            rows[name]["ratio"] = ratios(rows[name]["sides"])
            ordered = {known: rows[known] for known in ROWS if known in rows}
            write(result, {"versions": {**document["versions"], **used}, "rows": ordered})
    lines = []
    for name, row_found in json.loads(result.read_text())["rows"].items():
        for by, r in row_found["sides"].items():
            lines.append([name, by, *([f"{r[key]:.{digits}f}" for key, digits in MEASURED.items()] if "kl" in r else [r["error"], *[""] * 5])])
        lines.append([name, "ratio", *(f"{row_found['ratio'][key]:.2f}" if key in row_found["ratio"] else "" for key in MEASURED)])
    table(lines, ["scheme", "by", "KL", "perplexity", "MB", "wall s", "CPU s", "RSS MB"])


if __name__ == "__main__":
    main()
