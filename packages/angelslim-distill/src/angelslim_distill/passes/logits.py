"""Distillation of a student as it is from another model."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from .base import Distilling, Options


class Logits(Distilling):
    """Trains the model towards another model's distributions of the next token."""

    id = "distill.logits"

    class Config(Options):
        teacher: Path = Field(description="folder of the model to learn from, of the same tokenizer")  # type: ignore[assignment]
