"""Calibration windows, the same for every peer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the windows come from."""
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)


def cut(tokenizer: Any, given: argparse.Namespace) -> list[list[int]]:
    """Consecutive windows of token ids from the start of the text."""
    ids = tokenizer(Path(given.text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return [ids[i * given.tokens : (i + 1) * given.tokens] for i in range(given.samples)]
