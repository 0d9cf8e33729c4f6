"""The option that antidiagonal policies share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Stride = Annotated[int, Field(ge=1, description="tokens an antidiagonal spans; divides the block")]
