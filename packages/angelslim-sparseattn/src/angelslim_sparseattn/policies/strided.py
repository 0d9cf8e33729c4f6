"""What antidiagonal policies share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import MOST_TOKENS, Policy

Stride = Annotated[int, Field(ge=1, le=MOST_TOKENS, description="tokens an antidiagonal spans; divides the block")]


class Strided(Policy):
    """Policies that pool by strides of a block."""

    stride: Stride = 8
