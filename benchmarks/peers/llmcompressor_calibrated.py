"""Calibrated quantization as a user of llm-compressor writes it; run by quant_peers.py in that library's own environment.

python llmcompressor_calibrated.py MODEL OUT METHOD --text TEXT --samples 64 --tokens 512

METHODS lists them. AWQ needs a patch to run without a GPU: the library pins the memory of what it caches even where there
is no accelerator, and dies of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import add_options, cut


def w4(group_size: int, symmetric: bool) -> dict[str, Any]:
    """INT4 weights in groups."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": symmetric}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def preset(scheme: str) -> QuantizationModifier:
    """One of the library's named schemes."""
    return QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])


def kv_cache(strategy: str) -> QuantizationModifier:
    """FP8 KV cache, weights as they are."""
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    return QuantizationModifier(targets=[], ignore=[], kv_cache_scheme=scheme)


# method -> the library's modifiers
METHODS: dict[str, Callable[[argparse.Namespace], list[Any]]] = {
    "gptq": lambda given: [GPTQModifier(**w4(given.group_size, True), actorder="weight")],
    "gptq_no_order": lambda given: [GPTQModifier(**w4(given.group_size, True), actorder=None)],
    "awq": lambda given: [AWQModifier(n_grid=given.grid), QuantizationModifier(**w4(given.group_size, False))],
    "smooth": lambda _: [SmoothQuantModifier(smoothing_strength=0.5), preset("W8A8")],
    "fp8_static": lambda _: [preset("FP8")],
    "nvfp4": lambda _: [preset("NVFP4")],
    "nvfp4a16": lambda _: [preset("NVFP4A16")],
    "kv_fp8": lambda _: [kv_cache("tensor")],
    "kv_fp8_head": lambda _: [kv_cache("attn_head")],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("method", choices=METHODS)
    add_options(parser)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--grid", type=int, default=5, help="AWQ's grid; the library's default 20 takes four times as long on a CPU")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = Dataset.from_list([{"input_ids": w, "attention_mask": [1] * len(w)} for w in cut(tokenizer, given)])
    oneshot(
        model=model, recipe=METHODS[given.method](given), dataset=rows, max_seq_length=given.tokens,
        num_calibration_samples=given.samples, shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(given.out, save_compressed=True)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
