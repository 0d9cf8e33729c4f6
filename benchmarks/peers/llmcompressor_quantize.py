"""Data-free quantization as a user of llm-compressor writes it; run by core_peers.py in that library's own environment.

python llmcompressor_quantize.py MODEL OUT fp8_dynamic|int8_dynamic|int4_rtn [--group-size 64]
"""

from __future__ import annotations

import argparse

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def modifier(scheme: str, group_size: int) -> QuantizationModifier:
    """The library's modifier for one of our scheme names."""
    if scheme == "int4_rtn":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": True}
        return QuantizationModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    return QuantizationModifier(targets="Linear", scheme={"fp8_dynamic": "FP8_DYNAMIC", "int8_dynamic": "W8A8"}[scheme], ignore=["lm_head"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("scheme", choices=["fp8_dynamic", "int8_dynamic", "int4_rtn"])
    parser.add_argument("--group-size", type=int, default=64)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    oneshot(model=model, recipe=modifier(given.scheme, given.group_size))
    model.save_pretrained(given.out, save_compressed=True)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
