"""Tokens per second of a folder in vLLM; run by engine_speed.py in vLLM's own environment.

python vllm_speed.py FOLDER [--dtype bfloat16] [--batches 1 8] [--prompt 64] [--new 32]

The environment variables of engines.py must be set: some are read before this file is.
"""

from __future__ import annotations

import time

from vllm import LLM, SamplingParams
from workload import Prompts, arguments, report


def main() -> None:
    given = arguments()
    engine = LLM(
        model=given.model, dtype=given.dtype, max_model_len=1024, max_num_batched_tokens=4096, max_num_seqs=max(given.batches),
        enforce_eager=True, enable_prefix_caching=False, skip_tokenizer_init=True,
    ).llm_engine  # fmt: skip

    def run(prompts: Prompts, n: int) -> list[float]:
        sampling = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        start, stamps = time.perf_counter(), []
        for index, ids in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": ids}, sampling)
        while engine.has_unfinished_requests():
            if answers := engine.step():  # all prompts fit one step
                assert len(answers) == len(prompts)
                stamps.append(time.perf_counter() - start)
        return stamps

    report(run, given)


if __name__ == "__main__":
    main()
