"""Learned rounding of INT4 and NVFP4 as a user of auto-round writes it; run by quant_peers.py in that library's own environment.

python autoround_quantize.py MODEL OUT w4|w4_asym|w2|w2_asym|nvfp4 --text TEXT --samples 128 --tokens 2048 --iterations 200

Saved in a layout that `angelslim eval` reads: GPTQ for weights in groups, AWQ for those with zero points,
compressed-tensors for NVFP4, for which the environment needs compressed-tensors too; 2 bits as the rounded weights in 16. The library puts what it saves
into a folder of its own choice below the one it is given.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import add_options, cut

# method -> arguments of AutoRound, format to save in
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "w4": ({"bits": 4, "sym": True}, "auto_gptq"),
    "w4_asym": ({"bits": 4, "sym": False}, "auto_awq"),
    "w2": ({"bits": 2, "sym": True}, "fake"),
    "w2_asym": ({"bits": 2, "sym": False}, "fake"),
    "nvfp4": ({"scheme": "NVFP4"}, "llm_compressor"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("method", choices=METHODS)
    add_options(parser)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200, help="the library's default; 0 rounds to nearest")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    batches = list(torch.tensor(cut(tokenizer, given)).split(given.batch_size))
    options, layout = METHODS[given.method]
    if "bits" in options:
        options = {**options, "group_size": given.group_size}
    library = AutoRound(
        model, tokenizer, dataset=batches, iters=given.iterations, seqlen=given.tokens, nsamples=given.samples, batch_size=given.batch_size,
        device_map=given.device, **options,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=Path(given.out).absolute().parent) as below:
        _, folders = library.quantize_and_save(below, format=layout)
        shutil.move(folders if isinstance(folders, str) else folders[0], given.out)


if __name__ == "__main__":
    main()
