"""Perplexity of a folder from vLLM's prompt log-probabilities; run by engines.py in vLLM's own environment.

    python vllm_ppl.py FOLDER TEXT [--characters 2000] [--passages 8] [--dtype bfloat16]

Prints one JSON line. The environment variables of engines.py must be set: some are read before this file is.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    engine = LLM(model=given.folder, dtype=given.dtype, max_model_len=1024, enforce_eager=True, max_num_seqs=4)
    text = Path(given.text).read_text(encoding="utf-8")
    prompts = [text[i * given.characters : (i + 1) * given.characters] for i in range(given.passages)]
    nll = []
    for answer in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False):
        nll.append([-row[token].logprob for token, row in zip(answer.prompt_token_ids, answer.prompt_logprobs, strict=True) if row])
    scored = sum(map(len, nll))
    print(json.dumps({"perplexity": math.exp(sum(map(sum, nll)) / scored), "tokens": scored, "passages": [math.exp(sum(p) / len(p)) for p in nll]}))


if __name__ == "__main__":
    main()
