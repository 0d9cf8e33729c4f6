"""Perplexity of a folder in transformers on the same characters and tokens as vllm_ppl.py.

python transformers_ppl.py FOLDER TEXT [--characters 2000] [--passages 8] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=getattr(torch, given.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    text = Path(given.text).read_text(encoding="utf-8")
    nll = []
    with torch.inference_mode():
        for i in range(given.passages):
            ids = tokenizer(text[i * given.characters : (i + 1) * given.characters], return_tensors="pt")["input_ids"]
            nll.append((-model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]).tolist())
    scored = sum(map(len, nll))
    print(json.dumps({"perplexity": math.exp(sum(map(sum, nll)) / scored), "tokens": scored, "passages": [math.exp(sum(p) / len(p)) for p in nll]}))


if __name__ == "__main__":
    main()
