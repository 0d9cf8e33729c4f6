"""Compressed folders reload in plain transformers: no missing, unexpected or mismatched key, and the same perplexity.

    python benchmarks/reload.py --text TEXT --windows 8 --length 512 --out benchmarks/results/reload.json INT8 FP8 INT4

Each folder is loaded by `AutoModelForCausalLM.from_pretrained` with nothing of ours imported, scored window by
window, and compared with what `angelslim eval` says of it. Exit 1 if a key or a perplexity is off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from measure import angelslim, environment, measure, table, versions, write

TOLERANCE = 1e-3
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def plain(folder: str, text: str, windows: int, length: int) -> dict[str, Any]:
    """Key report and perplexity of a folder through transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model.eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    nll, tokens = 0.0, 0
    with torch.inference_mode():
        for window in ids[: windows * length].split(length):
            scores = model(window[None]).logits[0, :-1].float().log_softmax(-1).gather(1, window[1:, None])
            nll, tokens = nll - scores.double().sum().item(), tokens + scores.numel()
    return {"perplexity": math.exp(nll / tokens), "tokens": tokens, **{key: sorted(map(str, info.get(key) or ())) for key in KEYS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="compressed folders")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = ["--text", given.text, "--windows", str(given.windows), "--length", str(given.length)]
    if given.child:
        print(json.dumps(plain(given.folders[0], Path(given.text).read_text(encoding="utf-8"), given.windows, given.length)))
        return
    folders: dict[str, Any] = {}
    for folder in given.folders:
        child = [sys.executable, __file__, folder, *shape, "--out", os.devnull, "--child"]
        result = json.loads(measure(child, environment(given.threads)).stdout.splitlines()[-1])
        ours = json.loads(measure(angelslim("eval", folder, *shape, "--json"), environment(given.threads)).stdout)
        off = abs(ours["perplexity"] / result["perplexity"] - 1)
        good = not any(result[key] for key in KEYS) and ours["tokens"] == result["tokens"] and off < TOLERANCE
        folders[Path(folder).name] = {"ok": good, "eval_perplexity": ours["perplexity"], "backend": ours["backend"], "relative_difference": off, **result}
    write(
        Path(given.out),
        {
            "sample": {"windows": given.windows, "length": given.length},
            "versions": versions(sys.executable, ["torch", "transformers", "compressed-tensors"]),
            "folders": folders,
        },
    )
    rows = [
        [name, "yes" if r["ok"] else "NO", *(str(len(r[key])) for key in KEYS[:3]), f"{r['perplexity']:.4f}", f"{r['eval_perplexity']:.4f}", r["backend"]]
        for name, r in folders.items()
    ]
    table(rows, ["folder", "ok", "missing", "unexpected", "mismatched", "transformers", "angelslim eval", "backend"])
    sys.exit(not all(r["ok"] for r in folders.values()))


if __name__ == "__main__":
    main()
