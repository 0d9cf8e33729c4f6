"""Perplexity of a folder, or of a GGUF file, in plain transformers; run by engines.py.

python transformers_ppl.py FOLDER|FILE TEXT [--characters 2000] [--passages 8]

A GGUF file is dequantized by the gguf library.
"""

from __future__ import annotations

from pathlib import Path

import torch
from passages import arguments, passages, report
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase


def nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[float]:
    """Negative log-probability of each token but the first."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return (-model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]).tolist()


def main() -> None:
    given = arguments()
    path, more = Path(given.model), {}
    if path.suffix == ".gguf":
        path, more = path.parent, {"gguf_file": path.name}
    options = {**more, "quantization_config": GgufConfig(dequantize=True)} if more else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, **more)
    report([nll(model, tokenizer, text) for text in passages(given)])


if __name__ == "__main__":
    main()
