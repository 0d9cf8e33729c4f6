"""GPTQ and GPTAQ as a user of GPTQModel writes it; run by quant_peers.py in that library's own environment.

python gptqmodel_quantize.py MODEL OUT w4|gptaq --text TEXT --samples 64 --tokens 512
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it asks for one worker, and then refuses to start with fewer than two
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTAQConfig, GPTQConfig
from transformers import AutoTokenizer
from windows import add_options, cut

METHODS = {"w4": {}, "gptaq": {"gptaq": GPTAQConfig()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("method", choices=METHODS)
    add_options(parser)
    parser.add_argument("--group-size", type=int, default=64)
    given = parser.parse_args()
    rows = cut(AutoTokenizer.from_pretrained(given.model), given)
    # act_group_aware is the library's default: its order of columns needs no g_idx
    model = GPTQModel.load(given.model, GPTQConfig(bits=4, group_size=given.group_size, **METHODS[given.method]))
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
    model.save(given.out)


if __name__ == "__main__":
    main()
