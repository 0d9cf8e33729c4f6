"""GPTQ of decoder layers shaped as Llama-3.1-8B's on a GPU: seconds a layer and peak GPU memory.

    python benchmarks/gptq_gpu.py --work FOLDER --out benchmarks/results/gptq_gpu.json

The model has random weights, 8 layers, and a byte tokenizer, so that nothing is downloaded; the time of a layer does
not depend on either. `seconds_per_layer` is from one finished layer to the next; everything from the folder that is read to
the folder that is written is in `wall_s`. With `--peer-python` llm-compressor does the same work in its own environment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

import torch
from measure import write
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from angelslim_core import compress
from angelslim_core.testing.models import tiny_tokenizer

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True)
    for name, default in (("layers", 8), ("samples", 64), ("tokens", 2048), ("batch-size", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--use", default="quant.gptq,quant.gptaq")
    parser.add_argument("--peer-python", default="", help="Python of an environment with llm-compressor")
    given = parser.parse_args()
    work = Path(given.work)
    model = work / "llama"
    if not (model / "config.json").is_file():
        torch.manual_seed(0)
        with torch.device("cuda"):
            made = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_hidden_layers=given.layers), dtype=torch.bfloat16)
        made.save_pretrained(model)
        del made
        tiny_tokenizer(model)
    text = work / "text.txt"
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (given.samples * given.tokens + 64,), generator=generator)
    text.write_text("".join(map(chr, letters.tolist())))
    rows = {}
    for use in given.use.split(","):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        finished: list[float] = []
        start = time.perf_counter()
        compress(
            model=model, use=[use], out=work / "out", plugins=["quant"], device="cuda", replace=True,
            overrides=[f"calibration.data={text}", f"calibration.samples={given.samples}", f"calibration.tokens={given.tokens}", f"calibration.batch_size={given.batch_size}"],
            progress=lambda done, total, label, finished=finished: finished.append(time.perf_counter()) if label.startswith("layer ") else None,
        )  # fmt: skip
        between = [b - a for a, b in itertools.pairwise(finished)]
        rows[use] = {
            "seconds_per_layer": round(sum(between) / len(between), 2),
            "wall_s": round(time.perf_counter() - start, 1),
            "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
        print(json.dumps({use: rows[use]}), flush=True)
    shutil.rmtree(work / "out")
    if given.peer_python:
        torch.cuda.empty_cache()
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        save_file({"input_ids": ids[: given.samples * given.tokens].view(given.samples, given.tokens).clone()}, work / "ids.safetensors")
        command = [given.peer_python, str(Path(__file__).parent / "peers" / "llmcompressor_gpu.py"), str(model), str(work / "theirs")]
        done = subprocess.run(
            [*command, "--ids", str(work / "ids.safetensors"), "--batch-size", str(given.batch_size)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows["llmcompressor gptq"] = json.loads(done.stdout.strip().splitlines()[-1])
        print(json.dumps(rows["llmcompressor gptq"]), flush=True)
    write(
        Path(given.out),
        {
            "sample": {"layers": given.layers, "samples": given.samples, "tokens": given.tokens, "batch_size": given.batch_size},
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
