"""Log-probabilities of prompts as vLLM gives them, as distributions of a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from angelslim_core.errors import UsageError

from ..targets import TopK


def from_prompt_logprobs(token_ids: Sequence[int], prompt_logprobs: Sequence[Mapping[Any, Any] | None], top_k: int) -> TopK:
    """Distributions of one sample from `prompt_logprobs`, of the engine or of its server.

    vLLM's entry i scores token i, and entry 0 is None: what is kept at position t is entry t + 1. An entry holds the most
    likely tokens, and the prompt's own where it is none of them. The last position has no entry, and must not count.

    Args:
        token_ids: the T ids of the prompt.
        prompt_logprobs: T entries, token id (an int, or text from a server) -> log-probability, an object or a mapping with `logprob`.

    Returns:
        of one row of T positions; the last is a filler.

    Raises:
        UsageError: other lengths, a first entry that is not None, a token that is not scored, or too few tokens.
    """
    where, hint = "prompt_logprobs", f"ask vLLM for prompt_logprobs={top_k} of these very ids"
    if len(prompt_logprobs) != len(token_ids) or not token_ids or prompt_logprobs[0] is not None:
        raise UsageError(931, where, f"{len(prompt_logprobs)} entries are not those of a prompt of {len(token_ids)} tokens, the first of which is None", hint)
    ids, logp, label_logp = [], [], []
    for t, (token, entry) in enumerate(zip(token_ids[1:], prompt_logprobs[1:], strict=True), 1):
        scores = {int(i): _value(v) for i, v in (entry or {}).items()}
        most = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        if token not in scores or len(most) < top_k or not all(map(math.isfinite, scores.values())):
            raise UsageError(932, f"{where}[{t}]", f"does not score token {token} and {top_k} others, each by a finite number", hint)
        ids.append([i for i, _ in most])
        logp.append([v for _, v in most])
        label_logp.append(scores[token])
    ids.append(list(range(top_k)))
    logp.append([-math.inf] * top_k)
    label_logp.append(0.0)
    kept = torch.tensor(logp).nan_to_num(neginf=torch.finfo(torch.float16).min)
    return TopK(torch.tensor([ids]), kept[None], torch.tensor([label_logp]))


def _value(entry: Any) -> float:
    if isinstance(entry, Mapping):
        return float(entry["logprob"])
    return float(getattr(entry, "logprob", entry))
