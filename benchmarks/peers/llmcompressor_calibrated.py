"""Calibrated quantization as a user of llm-compressor writes it; run by quant_peers.py in that library's own environment.

python llmcompressor_calibrated.py MODEL OUT gptq|awq|smooth|fp8_static|nvfp4a16 --text TEXT --samples 64 --tokens 512
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(method: str, group_size: int, grid: int) -> list[Any]:
    """The library's modifiers for one method."""

    def w4(symmetric: bool) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": symmetric}
        return {"group_0": {"targets": ["Linear"], "weights": weights}}

    match method:
        case "gptq":
            groups = w4(True)
            groups["group_0"]["weights"]["actorder"] = "weight"
            return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
        case "awq":
            return [AWQModifier(config_groups=w4(False), ignore=["lm_head"], n_grid=grid)]
        case "smooth":
            return [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
        case "fp8_static":
            return [QuantizationModifier(targets="Linear", scheme="FP8", ignore=["lm_head"])]
        case "nvfp4a16":
            return [QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=["lm_head"])]
    raise ValueError(method)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("method", choices=["gptq", "awq", "smooth", "fp8_static", "nvfp4a16"])
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--grid", type=int, default=5, help="AWQ's grid; the library's default 20 takes four times as long on a CPU")
    given = parser.parse_args()
    if not torch.cuda.is_available():  # the library pins memory even where there is no accelerator, and dies of it
        torch.Tensor.pin_memory = lambda self, *_: self
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = tokenizer(Path(given.text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = [ids[i * given.tokens : (i + 1) * given.tokens] for i in range(given.samples)]
    rows = Dataset.from_list([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows])
    oneshot(
        model=model, recipe=recipe(given.method, given.group_size, given.grid), dataset=rows, max_seq_length=given.tokens,
        num_calibration_samples=given.samples, shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(given.out, save_compressed=True)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
