"""Perplexity of a folder from vLLM's prompt log-probabilities; run by engines.py in vLLM's own environment.

python vllm_ppl.py FOLDER TEXT [--characters 2000] [--passages 8]

The environment variables of engines.py must be set: some are read before this file is.
"""

from __future__ import annotations

from passages import arguments, passages, report
from vllm import LLM, SamplingParams


def main() -> None:
    given = arguments()
    engine = LLM(model=given.model, dtype="bfloat16", max_model_len=1024, enforce_eager=True, max_num_seqs=4)
    nll = []
    for answer in engine.generate(passages(given), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False):
        nll.append([-row[token].logprob for token, row in zip(answer.prompt_token_ids, answer.prompt_logprobs, strict=True) if row])
    report(nll)


if __name__ == "__main__":
    main()
