"""What the speed scripts of this folder share: the prompts, and the one JSON line each prints. Standard library only."""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from itertools import pairwise

Prompts = list[list[int]]
Run = Callable[[Prompts, int], list[float]]


def arguments() -> argparse.Namespace:
    """The model and how much of it to run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--packed", action="store_true", help="run linears packed wherever it is possible, also where that is not faster")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="steps of decoding after the first token")
    return parser.parse_args()


def prompts(batch: int, tokens: int) -> Prompts:
    """Random token ids, the same in every program."""
    draw = random.Random(batch)
    return [[draw.randrange(100, 30000) for _ in range(tokens)] for _ in range(batch)]


def report(run: Run, given: argparse.Namespace, **more: str) -> None:
    """Print tokens/s of the prompts, and of decoding by the median step, at each batch size, after a short warm-up.

    Args:
        run: writes `n` tokens for each prompt, greedily, and returns the seconds from its start until each was there.
    """
    found = {}
    for batch in given.batches:
        run(prompts(batch, 4), 3)
        stamps = run(prompts(batch, given.prompt), given.new + 1)
        assert len(stamps) == given.new + 1, len(stamps)
        step = statistics.median(after - before for before, after in pairwise(stamps))
        found[str(batch)] = {"prefill": batch * given.prompt / stamps[0], "decode": batch / step}
    print(json.dumps({**more, "tokens_per_s": found}))
