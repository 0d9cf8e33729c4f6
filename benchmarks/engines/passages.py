"""What the scripts of this folder share: the passages to score, and the one JSON line each prints. Standard library only."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path


def arguments() -> argparse.Namespace:
    """The model, the text and how it is cut."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="folder, or GGUF file")
    parser.add_argument("text")
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--plain-inputs", action="store_true", help="own reader only: inputs stay in 16 bits whatever the folder says")
    return parser.parse_args()


def passages(given: argparse.Namespace) -> list[str]:
    """Consecutive cuts from the start of the text."""
    text = Path(given.text).read_text(encoding="utf-8")
    return [text[i * given.characters : (i + 1) * given.characters] for i in range(given.passages)]


def report(nll: list[list[float]]) -> None:
    """Print the perplexity over all tokens of all passages, and of each.

    Args:
        nll: a row a passage, negative log-probability of each token but the first.
    """
    scored = sum(map(len, nll))
    print(json.dumps({"perplexity": math.exp(sum(map(sum, nll)) / scored), "tokens": scored, "passages": [math.exp(sum(p) / len(p)) for p in nll]}))
