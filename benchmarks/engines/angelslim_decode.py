"""Greedy answers in our engine, with a draft or without; run by specdec_vllm.py.

python angelslim_decode.py MODEL REQUESTS.json [--draft FOLDER] [--k 4]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from angelslim_core import load
from angelslim_specdec import Target, generate
from angelslim_specdec.generation import drafter_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("requests")
    parser.add_argument("--draft")
    parser.add_argument("--k", type=int, default=4)
    given = parser.parse_args()
    asked = json.loads(Path(given.requests).read_text())
    model, _ = load(given.model, "cpu", packed=False)
    target = Target(model.float().eval())
    drafter = drafter_of(given.draft, target)
    generate(target, torch.tensor([asked["prompts"][0]]), drafter, 8, k=given.k)
    tokens, seconds, drafts, accepted, positions = [], 0.0, 0, 0, [0] * given.k
    for prompt in asked["prompts"]:
        start = time.perf_counter()
        found = generate(target, torch.tensor([prompt]), drafter, asked["new"], k=given.k)
        seconds += time.perf_counter() - start
        tokens.append(found.decoded.tokens[0])
        drafts, accepted = drafts + found.decoded.drafts, accepted + found.decoded.accepted
        positions = [a + b for a, b in zip(positions, [*found.decoded.by_position, *positions], strict=False)]
    print(
        json.dumps(
            {"tokens": tokens, "seconds": seconds, **({"drafts": drafts, "accepted": accepted, "accepted_by_position": positions} if given.draft else {})}
        )
    )


if __name__ == "__main__":
    main()
