"""A folder of 2-bit or ternary weights in llama.cpp: its perplexity beside that of our own reader, and what it weighs.

    python benchmarks/lowbit_engines.py FOLDER --text TEXT --work WORK --llamacpp-python ENV/bin/python \
        --out benchmarks/results/lowbit_engines.json

FOLDER is what `angelslim run` made, in any layout. `angelslim convert` makes a GGUF file of each of `--types`, and a folder
of every other layout of ours that holds it; llama.cpp scores the files, our own reader the folders, inputs in 16 bits, on the
first passages of the text, each on its own. llama.cpp rounds the inputs of a product to 8 bits, which alone moves perplexity
by 1% or 2% on so short a text. A type or layout that does not hold the codes is a row with the reason.

Exit 1 if two folders differ at all, or if llama.cpp is more than 3% off. llama.cpp comes as the wheel
xllamacpp==2026.10.11549.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from engines import PACKAGES, perplexity
from measure import angelslim, environment, measure, reason, table, versions, write

TOLERANCE = 0.03
LAYOUTS = ("compressed-tensors", "packed")


def convert(given: argparse.Namespace, to: str, kind: str = "") -> tuple[Path, dict[str, Any]]:
    """What `angelslim convert` makes of the folder, and says of it."""
    out = Path(given.work) / (f"{kind}.gguf" if kind else to)
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    command = angelslim("convert", given.folder, str(out), "--to", to, *(["--type", kind] if kind else []), "--json")
    return out, json.loads(measure(command, environment(given.threads)).stdout)


def weight_bytes(path: Path) -> int:
    """Bytes of a file, or of the weight files of a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))


def row(given: argparse.Namespace, to: str, kind: str = "") -> dict[str, Any]:
    """One folder or file: what was converted, its bytes, and its perplexity; or why there is none."""
    try:
        made, said = convert(given, to, kind)
        if kind:
            found = perplexity(given.llamacpp_python, "llamacpp_ppl.py", made, given)
        else:
            found = perplexity(sys.executable, "angelslim_ppl.py", made, given, "--plain-inputs")
    except RuntimeError as error:  # a refusal is a result, and other rows go on
        return {"error": reason(error)}
    return {"bytes": weight_bytes(made), **{key: said[key] for key in ("tensors", "rounded") if key in said}, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="compressed folder")
    parser.add_argument("--base", help="the plain model it was made of, for its perplexity and bytes")
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", required=True, help="folder for what is made")
    parser.add_argument("--types", default="auto,f16", help="GGUF types, separated by commas")
    parser.add_argument("--llamacpp-python", default=sys.executable, help="Python of an environment with xllamacpp and numpy")
    for name, default in (("characters", 2000), ("passages", 8), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    Path(given.work).mkdir(parents=True, exist_ok=True)
    folder = Path(given.folder)
    plain = {"base": Path(given.base)} if given.base else {}
    rows = {
        name: {"bytes": weight_bytes(path), **perplexity(sys.executable, "angelslim_ppl.py", path, given, "--plain-inputs")}
        for name, path in {**plain, "folder": folder}.items()
    }
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"].removeprefix("angelslim-")
    rows |= {layout: row(given, layout) for layout in LAYOUTS if layout != stored}
    rows |= {f"llama.cpp {kind}": row(given, "gguf", kind) for kind in given.types.split(",")}
    expected, wrong = rows["folder"]["perplexity"], []
    for name, found in rows.items():
        if name != "base" and "error" not in found:
            found["relative_difference"] = round(found["perplexity"] / expected - 1, 5)
            if abs(found["relative_difference"]) > (TOLERANCE if name.startswith("llama.cpp") else 0):
                wrong.append(name)
    sample = {key: getattr(given, key) for key in ("characters", "passages", "threads")}
    used = {"llama.cpp": given.llamacpp_python, "ours": sys.executable}
    document = {
        "sample": {**sample, "text": Path(given.text).name, "folder": folder.name, "layout": stored, "tolerance": TOLERANCE},
        "versions": {key: versions(python, PACKAGES) for key, python in used.items()},
        "rows": rows,
    }
    write(Path(given.out), document)
    lines = [
        [name, f"{r['perplexity']:.4f}", f"{r['bytes'] / 1e6:.1f}", ", ".join(f"{n} {k}" for k, n in r.get("tensors", {}).items()), str(r.get("rounded", ""))]
        if "error" not in r
        else [name, "-", "-", r["error"], ""]
        for name, r in rows.items()
    ]
    table(lines, ["row", "perplexity", "MB", "tensors", "rounded"])
    sys.exit(f"off: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
