"""GPTQ by llm-compressor on a GPU; run by gptq_gpu.py in that library's own environment, prints one JSON line.

python llmcompressor_gpu.py MODEL OUT --ids FILE.safetensors --batch-size 4
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


class Timed(GPTQModifier):
    """Notes when the linears of each layer are done."""

    def compress_modules(self) -> None:
        some = bool(self._num_samples)
        super().compress_modules()
        if not some:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        FINISHED.append(time.perf_counter())


FINISHED: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--ids", required=True, help="safetensors file with `input_ids` [samples, tokens]")
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    start = time.perf_counter()
    ids = load_file(given.ids)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "actorder": "weight"}
    recipe = Timed(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(model=model, recipe=[recipe], dataset=DataLoader(rows, batch_size=given.batch_size), num_calibration_samples=len(rows), max_seq_length=ids.shape[1])
    model.save_pretrained(given.out, save_compressed=True)
    between = [b - a for a, b in itertools.pairwise(FINISHED)]
    found = {
        "seconds_per_layer": round(sum(between) / len(between), 2),
        "wall_s": round(time.perf_counter() - start, 1),
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
