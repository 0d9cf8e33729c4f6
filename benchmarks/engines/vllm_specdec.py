"""Greedy answers in vLLM, with a draft or without; run by specdec_vllm.py in vLLM's own environment.

python vllm_specdec.py MODEL REQUESTS.json [--speculative JSON] [--dtype float32]

The environment variables of engines.py must be set: some are read before this file is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def counters(engine: LLM) -> dict[str, Any]:
    """vLLM's own counts since it started."""
    found = {metric.name.rpartition("spec_decode_num_")[2]: metric for metric in engine.get_metrics() if "spec_decode_num_" in metric.name}
    return {name: getattr(metric, "values", None) or getattr(metric, "value", 0) for name, metric in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("requests")
    parser.add_argument("--speculative", help="vLLM's speculative_config, as JSON")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    asked = json.loads(Path(given.requests).read_text())
    extra = {"speculative_config": json.loads(given.speculative)} if given.speculative else {}
    engine = LLM(
        model=given.model, dtype=given.dtype, max_model_len=asked["length"], enforce_eager=True, max_num_seqs=1, enable_prefix_caching=False,
        disable_log_stats=False, **extra,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=asked["new"], detokenize=False)
    engine.generate({"prompt_token_ids": asked["prompts"][0]}, SamplingParams(temperature=0, max_tokens=8, detokenize=False), use_tqdm=False)
    before, tokens, seconds = counters(engine), [], 0.0
    for prompt in asked["prompts"]:
        start = time.perf_counter()
        (answer,) = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        seconds += time.perf_counter() - start
        tokens.append(list(answer.outputs[0].token_ids))
    after, drafted = counters(engine), {}
    if given.speculative:
        accepted = after["accepted_tokens"] - before["accepted_tokens"]
        positions = [late - early for late, early in zip(after["accepted_tokens_per_pos"], before["accepted_tokens_per_pos"] or [0] * 64, strict=False)]
        drafted = {"drafts": after["drafts"] - before["drafts"], "accepted": accepted, "accepted_by_position": positions}
    print(json.dumps({"tokens": tokens, "seconds": seconds, **drafted}))


if __name__ == "__main__":
    main()
